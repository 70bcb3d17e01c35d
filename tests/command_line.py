"""Checkpoints for the command line, its runs, and what they have logged, for the tests of several tasks."""

import csv
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from processes import Run, command, ranks

QUIET = [
    *("--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"),
    *("--trainer.num_sanity_val_steps", "0"),
]


def metrics(folder: Path) -> list[dict[str, float]]:
    """The lines of a run's metrics.csv, without its empty cells."""
    with (folder / "metrics.csv").open(newline="") as lines:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(lines)]


def saved(model: Any, folder: Path) -> Path:
    """A checkpoint of a task's module that was not trained."""
    trainer = Trainer(default_root_dir=folder, accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.strategy.connect(model)
    trainer.save_checkpoint(folder / "a.ckpt")
    return folder / "a.ckpt"


def saved_options(run: Any, names: Iterable[str]) -> dict[str, Any]:
    """Hyperparameters in the last checkpoint of a finished run, with lists for tuples."""
    saved = torch.load(Path(str(run.trainer.log_dir)) / "checkpoints/last.ckpt")["hyper_parameters"]
    return {name: list(saved[name]) if isinstance(saved[name], tuple) else saved[name] for name in names}


def validate_alone_and_together(trained: Path, folder: Path, *together: str) -> list[Path]:
    """Validates a run's last checkpoint in one process, and in two with more options; returns both runs' folders."""
    options = ["validate", "-c", str(trained / "config.yaml"), *QUIET, "--data.batch_size", "2"]
    options += ["--ckpt_path", str(trained / "checkpoints" / "last.ckpt"), "--trainer.default_root_dir", "."]
    ddp = ["--trainer.devices", "2", "--trainer.strategy", "ddp", *together]
    for name in ("alone", "together"):
        (folder / name).mkdir()
    started = [Run(folder / "alone", command, *options), *ranks(folder / "together", command, *options, *ddp)]
    for run in started:
        run.finish()
    return [folder / name / "version_0" for name in ("alone", "together")]
