"""The progress line of a run on a terminal."""

import io
import os
import pty
import re
import sys
from pathlib import Path

import pytest
from rich.console import Console

from involution.engine.command import run
from involution.engine.progress import OneLine, _clock

FIT = ["fit", "-c", "digits_rednet", "--trainer.accelerator", "cpu", "--trainer.max_epochs", "2"]
FIT += ["--trainer.limit_train_batches", "3", "--trainer.limit_val_batches", "2", "--data.batch_size", "4"]
SMALL = "{channels: [16, 16, 16, 16], stem_channels: 32}"


def test_clock() -> None:
    assert [_clock(one) for one in (0.4, 59.6, 600, 3723)] == ["0:00", "1:00", "10:00", "1:02:03"]


def lines(text: str) -> list[str]:
    """What was on a terminal at one time or another, without colours and cursor movements."""
    return [one.strip() for one in re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)) if one.strip()]


def test_one_line_with_loss_metric_speed_and_time_left(in_tmp_path: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read twice a second in a run; here after every batch."""
    monkeypatch.setattr("involution.engine.progress.REFRESH", 0.0)
    told: list[str] = []
    screen = Console(file=io.StringIO(), force_terminal=True, width=150)

    class Told(OneLine):
        def _update(self, description: str, text: str | None, done: int | None) -> None:
            told.append(f"{description}|{text or ''}|{done}")
            super()._update(description, text, done)

    monkeypatch.setattr("involution.engine.command.OneLine", lambda: Told(screen))
    finished = run([*FIT, "--model.model_kwargs", SMALL, "--trainer.enable_progress_bar", "true"])
    assert isinstance(finished.trainer.progress_bar_callback, OneLine)
    training = [one for one in told if one.startswith("epoch")]
    assert len(training) == 6
    number = r"[\d.e+-]+"
    speed = r"\d+ images/s  0:\d\d left"
    for index, one in enumerate(training):
        metric = "" if index < 3 else rf"val/accuracy {number}  "
        assert re.fullmatch(rf"epoch {1 + index // 3}/2\|loss {number}  {metric}{speed}\|{index + 1}", one)
    assert training[-1].endswith("0:00 left|6")
    assert [one for one in told if one not in training] == ["validation 1/2||None", "validation 2/2||None"] * 2
    drawn = screen.file.getvalue()  # type: ignore[attr-defined]
    assert "images/s" in drawn
    epochs = [one for one in lines(drawn) if re.match(r"epoch \d/2  train/loss", one)]
    assert [one.split()[1] for one in epochs] == ["1/2", "2/2"]  # above the line
    assert drawn.count("\n") <= 4  # theirs: the line itself is overwritten


def test_on_a_terminal_the_line_is_there_and_gone_at_the_end(in_tmp_path: None) -> None:
    """A pseudo-terminal: what is left on the screen has one line per epoch, and the next commands."""
    output: list[bytes] = []

    def read(descriptor: int) -> bytes:
        content = os.read(descriptor, 4096)
        output.append(content)
        return content

    arguments = [*FIT, "--model.model_kwargs", SMALL]
    before = os.dup(1)
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)  # pty.spawn repeats the output here
    try:
        status = pty.spawn([sys.executable, "-m", "involution.cli", *arguments], read)
    finally:
        os.dup2(before, 1)
    assert os.waitstatus_to_exitcode(status) == 0
    text = b"".join(output).decode()
    assert "validation 2/2" in text
    shown = lines(text)
    assert [one.split()[1] for one in shown if re.match(r"epoch \d/2  train/loss", one)] == ["1/2", "2/2"]
    assert shown[-2].startswith("next: involution test")
    assert Path("runs/digits_rednet/version_0/checkpoints/best.ckpt").is_file()


def test_a_given_progress_bar_is_kept(in_tmp_path: None) -> None:
    bar = "[{class_path: lightning.pytorch.callbacks.TQDMProgressBar}]"
    options = ["--trainer.callbacks", bar, "--trainer.enable_progress_bar", "true", "--trainer.max_epochs", "1"]
    finished = run([*FIT, "--model.model_kwargs", SMALL, *options])
    assert type(finished.trainer.progress_bar_callback).__name__ == "TQDMProgressBar"
