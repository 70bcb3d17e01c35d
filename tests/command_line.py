"""Runs of the command line, and what they have logged, for the tests of several tasks."""

import csv
import os
import subprocess
import sys
from pathlib import Path

QUIET = [
    *("--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"),
    *("--trainer.num_sanity_val_steps", "0"),
]


def metrics(folder: Path) -> list[dict[str, float]]:
    """The lines of a run's metrics.csv, without its empty cells."""
    with (folder / "metrics.csv").open(newline="") as lines:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(lines)]


def validate_alone_and_together(trained: Path, folder: Path, *together: str) -> list[Path]:
    """Validates a run's last checkpoint in one process, and in two with more options; returns both runs' folders."""
    options = ["validate", "-c", str(trained / "config.yaml"), *QUIET, "--data.batch_size", "2"]
    options += ["--ckpt_path", str(trained / "checkpoints" / "last.ckpt"), "--trainer.default_root_dir", "."]
    two = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    ddp = ["--trainer.devices", "2", "--trainer.strategy", "ddp", *together]
    for name, launcher, more in (("alone", [], []), ("together", two, ddp)):
        (folder / name).mkdir()
        command = [sys.executable, *launcher, "-m", "involution.cli", *options, *more]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=folder / name, env=environment, capture_output=True)
        assert done.returncode == 0, done.stderr.decode()
    return [folder / name / "version_0" for name in ("alone", "together")]
