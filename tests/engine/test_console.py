"""The console output of a run that is redirected to a file."""

import re
import shlex
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import TensorDataset

from involution.cli import main
from involution.engine.console import result_of
from involution.engine.data import TaskData
from involution.engine.images import cores

FIT = ["fit", "-c", "digits_rednet", "--trainer.accelerator", "cpu", "--trainer.limit_train_batches", "2"]


def test_a_line_per_epoch_then_the_next_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings(record=True) as told:
        assert main([*FIT, "--trainer.max_epochs", "2", "--trainer.limit_val_batches", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"0\.34 million parameters; 2 batches an epoch", lines[0])
    for number in (1, 2):
        numbers = r"  train/loss \d\.\d{4}  val/loss \d\.\d{4}  val/accuracy 0\.\d{4}  \d+ s"
        assert re.fullmatch(f"epoch {number}/2{numbers}", lines[number])
    best = "runs/digits_rednet/version_0/checkpoints/best.ckpt"
    assert re.fullmatch(rf"best val/accuracy 0\.\d{{4}}: {best}", lines[3])
    assert Path(best).is_file()
    assert lines[4] == f"next: involution test -c runs/digits_rednet/version_0/config.yaml --ckpt_path {best}"
    assert lines[5].split()[:4] == ["involution", "predict", "--ckpt_path", best]
    assert len(lines) == 6
    said = [str(one.message) for one in told if "lightning" in one.filename and "jsonargparse" not in str(one.category)]
    assert [message for message in said if "Jsonargparse" not in message and "deprecated" not in message] == []


def test_printed_commands_are_quoted() -> None:
    """A folder with a space: a shell gets the path back in one piece."""
    best = ModelCheckpoint("my runs/checkpoints", monitor="val/accuracy")
    best.best_model_path = "my runs/checkpoints/best.ckpt"
    trainer = Trainer(accelerator="cpu", logger=False, callbacks=[best])
    for line in result_of(trainer, "my runs/config.yaml", "test")[1:]:
        words = shlex.split(line.removeprefix("next: "))
        assert words[words.index("--ckpt_path") + 1] == best.best_model_path
        assert "-c" not in words or words[words.index("-c") + 1] == "my runs/config.yaml"


@pytest.mark.parametrize("options", [["--trainer.logger", "false"], ["--trainer.fast_dev_run", "true"]])
def test_last_finds_what_a_run_without_a_logger_kept(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    more = ["--trainer.limit_val_batches", "1", "--trainer.num_sanity_val_steps", "0"]
    assert main([*FIT, *more, "--trainer.max_epochs", "1", *options]) == 0
    kept = list(tmp_path.rglob("*.ckpt"))
    again = main([*FIT, *more, "--trainer.max_epochs", "2", "--trainer.logger", "false", "--ckpt_path", "last"])
    if "--trainer.logger" in options:
        assert {file.name for file in kept} == {"best.ckpt", "last.ckpt"}
        assert again == 0
    else:
        assert list(tmp_path.rglob("*")) == []
        assert again == 1
        assert "ckpt_path last: no version_*" in capsys.readouterr().err


class Nothing(TaskData):
    def setup(self, stage: str) -> None:
        """No files."""


def test_loader_workers_share_the_cores() -> None:
    data = Nothing(2, None)
    data.val_set = TensorDataset(torch.zeros(4))
    assert data.val_dataloader().num_workers == cores()
    assert Nothing(2, 0)._loader(data.val_set).num_workers == 0
