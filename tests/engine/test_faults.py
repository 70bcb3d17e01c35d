"""Faults while files are written: a full disk, no memory, kill -9, Ctrl-C. Nothing is lost that was on the disk."""

import os
import random
import resource
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import examples
from processes import Run
from safetensors.torch import load_file

from involution.cli import main
from involution.engine.checkpoints import AtomicCheckpointIO, last_checkpoint
from involution.engine.command import run
from involution.engine.convert import _write

FIT = [
    *("fit", "-c", "digits_resnet", "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"),
    *("--trainer.limit_val_batches", "1", "--data.batch_size", "4", "--trainer.num_sanity_val_steps", "0"),
]


def checkpoint(number: int, file: Path) -> None:
    AtomicCheckpointIO().save_checkpoint({"number": number, "weights": torch.full((1 << 19,), float(number))}, file)


def safetensors(number: int, file: Path) -> None:
    _write({"weights": torch.full((1 << 19,), float(number))}, {}, file)


WRITERS = {"ckpt": checkpoint, "safetensors": safetensors}


def whole(file: Path) -> float:
    """The number of which all weights of a file are."""
    weights = (load_file(file) if file.suffix == ".safetensors" else torch.load(file))["weights"]
    assert weights.shape == (1 << 19,)
    assert (weights == weights[0]).all()
    return float(weights[0])


def write_until_killed(kind: str) -> None:
    for number in range(1, 10_000):
        WRITERS[kind](number, Path(f"a.{kind}"))


@pytest.mark.parametrize("kind", WRITERS)
def test_a_process_that_is_killed_leaves_a_whole_file(kind: str, tmp_path: Path) -> None:
    """Killed at random times of writing; then the last whole file is there, and the next write succeeds."""
    numbers, file = random.Random(kind), tmp_path / "folder" / f"a.{kind}"
    file.parent.mkdir()
    for _ in range(examples(3)):
        before = whole(file) if file.exists() else 0
        stamp = file.stat().st_mtime_ns if file.exists() else 0
        writing = Run(file.parent, write_until_killed, kind)
        while not file.exists() or file.stat().st_mtime_ns == stamp:
            time.sleep(0.002)
        time.sleep(numbers.uniform(0, 0.1))
        writing.process.kill()
        writing.finish(-signal.SIGKILL)
        assert whole(file) >= 1 or before
        assert {path.name for path in file.parent.iterdir()} <= {file.name, f".{file.name}.part"}
        WRITERS[kind](7, file)
        assert whole(file) == 7
        assert [path.name for path in file.parent.iterdir()] == [file.name]


@contextmanager
def no_file_larger_than(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("kind", WRITERS)
def test_a_disk_without_room_is_named(kind: str, tmp_path: Path) -> None:
    """Not torch's "unexpected pos 64 vs 0", which says nothing of the disk."""
    file = tmp_path / f"a.{kind}"
    WRITERS[kind](1, file)
    with no_file_larger_than(100_000), pytest.raises(OSError, match=rf"[Ff]ile too large.*a\.{kind}"):
        WRITERS[kind](2, file)
    assert whole(file) == 1
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


@pytest.mark.parametrize("error", [MemoryError("no memory"), KeyboardInterrupt(), OSError(30, "Read-only file system")])
def test_any_error_while_writing_leaves_the_last_file(error: BaseException, tmp_path: Path, monkeypatch: Any) -> None:
    file = tmp_path / "a.ckpt"
    checkpoint(1, file)

    def failing(content: Any, stream: Any) -> None:
        stream.write(b"half")
        raise error

    monkeypatch.setattr(torch, "save", failing)
    with pytest.raises(type(error)):
        checkpoint(2, file)
    monkeypatch.undo()
    assert whole(file) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["a.ckpt"]


def test_a_folder_that_cannot_be_written_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*FIT, "--trainer.default_root_dir", "/proc/nowhere", "--trainer.max_epochs", "1"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("involution fit: ")
    assert "/proc/nowhere" in lines[-1]


def train() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # as at a terminal: background jobs may ignore it
    run([*FIT, "--recovery.every_n_train_steps", "2"])


def test_ctrl_c_ends_training_promptly_with_a_good_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    training = Run(folder, train)
    while not list(folder.rglob("last.ckpt")):
        assert training.process.is_alive()
        time.sleep(0.05)
    assert training.process.pid is not None
    os.kill(training.process.pid, signal.SIGINT)
    training.process.join(120)  # a run that went on would take longer
    assert not training.process.is_alive()
    assert training.process.exitcode == 1
    file = last_checkpoint(folder / "runs" / "digits_resnet")
    step = torch.load(file)["global_step"]
    assert step >= 2
    options = ["--trainer.max_steps", str(step + 1), "--trainer.default_root_dir", str(file.parents[2])]
    assert run([*FIT, "--ckpt_path", "last", *options]).trainer.global_step == step + 1
