"""Runs that are killed, and go on as if they had not been; checkpoints on a disk that is full."""

import io
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import metrics
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from involution.engine.checkpoints import AtomicCheckpointIO, last_checkpoint
from involution.engine.sampling import RandomStates, ResumableSampler, SampleSeeded

FIT = """
import os, signal, sys
import torch
from lightning.pytorch import Callback

class Killed(Callback):
    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == int(os.environ.get("KILL_AT", -1)):
            os.kill(os.getpid(), signal.SIGKILL)

import involution.engine.command as command
states = command.RandomStates
command.RandomStates = type("Both", (states,), {
    "on_train_batch_start": lambda self, trainer, *rest: Killed().on_train_batch_start(trainer),
    "state_key": states.__qualname__,
})
torch.set_num_threads(1)
from involution import zoo
cli = command.run(sys.argv[1:])
torch.save({name: value.clone() for name, value in cli.model.state_dict().items()}, os.environ["WEIGHTS"])
"""
OPTIONS = [
    *("fit", "-c", "digits_resnet", "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"),
    *("--trainer.max_epochs", "2", "--trainer.limit_train_batches", "5", "--trainer.limit_val_batches", "1"),
    *("--trainer.deterministic", "true", "--data.batch_size", "4", "--recovery.every_n_train_steps", "2"),
    *("--model.model_kwargs", "{drop_rate: 0.5}", "--trainer.num_sanity_val_steps", "0"),
    *("--trainer.callbacks", "lightning.pytorch.callbacks.EMAWeightAveraging", "--trainer.callbacks.decay", "0.7"),
    *("--model.mixup", "0.3", "--model.cutmix", "1.0"),
]


def fit(folder: Path, *options: str, kill_at: int = -1) -> dict[str, torch.Tensor] | None:
    """Trains in a process of its own; the weights at the end, or None if it was killed."""
    weights = folder / "weights.pt"
    environment = {**os.environ, "KILL_AT": str(kill_at), "WEIGHTS": str(weights)}
    command = [sys.executable, "-c", FIT, *OPTIONS, *options]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if kill_at >= 0:
        assert done.returncode == -signal.SIGKILL, done.stderr
        return None
    assert done.returncode == 0, done.stderr
    return torch.load(weights)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """Weights after ten steps: of the moving average, whose norms have statistics of their own."""
    want = fit(tmp_path_factory.mktemp("whole"))
    assert want is not None
    return want


@pytest.mark.parametrize("workers", [0, 2])
def test_a_killed_run_goes_on_bit_by_bit(tmp_path: Path, workers: int, uninterrupted: dict[str, torch.Tensor]) -> None:
    """Ten steps: killed in the midst of an epoch, after a checkpoint's step, and in the next epoch."""
    loading = ["--data.num_workers", str(workers)]
    assert fit(tmp_path, *loading, kill_at=3) is None  # last.ckpt is that of step 2
    assert fit(tmp_path, *loading, "--ckpt_path", "last", kill_at=7) is None  # and of step 6, in the second epoch
    got = fit(tmp_path, *loading, "--ckpt_path", "last")
    assert got is not None
    want = uninterrupted
    assert want.keys() == got.keys()
    assert [name for name in want if not torch.equal(want[name], got[name])] == []


def test_another_batch_size_in_the_midst_of_an_epoch_is_refused(tmp_path: Path, monkeypatch: Any) -> None:
    from involution.engine.command import run

    monkeypatch.chdir(tmp_path)
    assert fit(tmp_path, kill_at=3) is None
    with pytest.raises(ValueError, match=r"batch_size and processes must be 4 and 1, .* got 8 and 1"):
        run([*OPTIONS, "--ckpt_path", "last", "--data.batch_size", "8"])
    run([*OPTIONS, "--trainer.max_epochs", "1", "--trainer.default_root_dir", "whole"])  # its end is an epoch's
    there = ["--trainer.default_root_dir", "whole", "--ckpt_path", "last"]
    assert run([*OPTIONS, *there, "--data.batch_size", "8"]).trainer.global_step == 10


def test_last_without_a_run_names_the_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"ckpt_path last: no version_.* in .*nothing"):
        last_checkpoint(tmp_path / "nothing")


class Indices(Dataset[Any]):
    """Each sample is its index and a number that it draws."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> tuple[int, torch.Tensor]:
        return index, v2.RandomCrop(2)(torch.arange(36.0).view(1, 6, 6)).sum() + torch.rand(())


def read(sampler: ResumableSampler, epoch: int, workers: int = 0) -> list[tuple[int, float]]:
    sampler.set_epoch(epoch)
    loader = DataLoader(SampleSeeded(Indices(), 5), batch_size=3, sampler=sampler, num_workers=workers)
    return [(int(i), float(number)) for indices, numbers in loader for i, number in zip(indices, numbers, strict=True)]


def test_samples_depend_on_seed_epoch_and_index_alone() -> None:
    first, second = (read(ResumableSampler(Indices(), 5), epoch) for epoch in (0, 1))
    assert sorted(index for index, _ in first) == list(range(10))
    assert [index for index, _ in first] != [index for index, _ in second]
    assert not set(first) & set(second)
    assert read(ResumableSampler(Indices(), 5), 1, workers=2) == second
    resumed = ResumableSampler(Indices(), 5)
    resumed.resume(1, 6)
    assert read(resumed, 1) == second[6:]
    assert read(resumed, 0) == first
    state = torch.get_rng_state()
    want = SampleSeeded(Indices(), 5)[0, 3]
    assert torch.equal(torch.get_rng_state(), state)
    torch.set_default_dtype(torch.float64)  # as Lightning does for precision 64-true
    try:
        got = SampleSeeded(Indices(), 5)[0, 3]
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert got == want


@pytest.mark.parametrize("count", [2, 3, 7])
def test_processes_cover_every_index_and_repeat_few(count: int) -> None:
    parts = [[index for _, index in ResumableSampler(Indices(), 5, count, rank)] for rank in range(count)]
    assert len({len(part) for part in parts}) == 1  # or one would wait for ever
    seen = [index for part in parts for index in part]
    assert set(seen) == set(range(10))
    assert len(seen) - 10 < count


def test_processes_cover_every_index_once() -> None:
    parts = [[index for _, index in ResumableSampler(Indices(), 5, 2, rank)] for rank in (0, 1)]
    assert sorted(parts[0] + parts[1]) == list(range(10))


def test_a_checkpoint_that_cannot_be_written_leaves_the_last_one(tmp_path: Path, monkeypatch: Any) -> None:
    file = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"step": 1}, file)

    def full(checkpoint: Any, stream: Any) -> None:
        stream.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        AtomicCheckpointIO().save_checkpoint({"step": 2}, file)
    monkeypatch.undo()
    assert torch.load(file) == {"step": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_is_an_error(tmp_path: Path, monkeypatch: Any) -> None:
    file = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"step": 1}, file)
    monkeypatch.setattr(Path, "open", lambda self, mode: io.FileIO("/dev/full", "w"))
    with pytest.raises((OSError, RuntimeError)):
        AtomicCheckpointIO().save_checkpoint({"weights": torch.zeros(1 << 20)}, file)
    monkeypatch.undo()
    assert torch.load(file) == {"step": 1}


def test_a_disk_that_fills_up_ends_the_run_and_keeps_the_last_checkpoint(tmp_path: Path, monkeypatch: Any) -> None:
    """From the third step on no file may be larger than 200 kB; the checkpoint of the second one leads on."""
    import resource

    from involution.engine.command import run
    from involution.tasks.classify import Classifier

    monkeypatch.chdir(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    step = Classifier.training_step

    def filling(self: Any, *batch: Any) -> torch.Tensor:
        if self.trainer.global_step == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
        return step(self, *batch)

    monkeypatch.setattr(Classifier, "training_step", filling)
    try:
        with pytest.raises((OSError, RuntimeError)):  # torch's writer has errors of its own
            run(OPTIONS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs/digits_resnet/version_0/checkpoints"
    assert [path.name for path in folder.iterdir()] == ["last.ckpt"]
    assert torch.load(folder / "last.ckpt")["global_step"] == 2
    assert run([*OPTIONS, "--ckpt_path", "last"]).trainer.global_step == 10


def test_all_generators_go_on_from_the_checkpoint() -> None:
    import random

    import numpy as np

    callback = RandomStates()
    saved = callback.state_dict()
    want = torch.rand(3), np.random.rand(3), random.random()
    callback.load_state_dict(saved)
    callback.on_train_start(None, None)  # type: ignore[arg-type]
    assert torch.equal(torch.rand(3), want[0])
    assert (np.random.rand(3) == want[1]).all()
    assert random.random() == want[2]


RESUMED = [
    *("fit", "-c", "digits_resnet", "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"),
    *("--trainer.limit_train_batches", "2", "--trainer.limit_val_batches", "1", "--data.batch_size", "4"),
    *("--trainer.log_every_n_steps", "1"),
]


def test_options_of_the_command_line_are_in_force_after_a_resume(tmp_path: Path, monkeypatch: Any, caplog: Any) -> None:
    from involution.engine.command import run

    monkeypatch.chdir(tmp_path)
    stop = ["--trainer.callbacks", "EarlyStopping", "--trainer.callbacks.monitor", "val/loss"]
    run([*RESUMED, *stop, "--trainer.callbacks.patience", "7", "--trainer.max_epochs", "1", "--model.lr", "0.3"])
    last = ["--ckpt_path", "last", "--trainer.max_epochs", "2"]
    options = ["--model.lr", "0.002", "--model.momentum", "0.5", "--model.weight_decay", "0.25"]
    cli = run([*RESUMED, *stop, "--trainer.callbacks.patience", "2", *last, *options, "--model.warmup_steps", "0"])
    groups = cli.trainer.optimizers[0].param_groups
    assert [(group["initial_lr"], group["momentum"]) for group in groups] == [(0.002, 0.5)] * 2
    assert [group["weight_decay"] for group in groups] == [0.25, 0]
    assert [one.patience for one in cli.trainer.early_stopping_callbacks] == [2]
    lines = metrics(tmp_path / "runs" / "digits_resnet" / "version_1")
    assert max(line["lr"] for line in lines if "lr" in line) <= 0.002
    saved = torch.load(tmp_path / "runs/digits_resnet/version_1/checkpoints/last.ckpt")
    assert saved["hyper_parameters"]["lr"] == saved["optimizer_states"][0]["param_groups"][0]["initial_lr"] == 0.002
    # What is not given is the checkpoint's, whatever the recipe says; and it is said.
    with caplog.at_level("INFO"):
        cli = run([*RESUMED, *stop, "--ckpt_path", "last", "--trainer.max_epochs", "3"])
    assert cli.trainer.optimizers[0].param_groups[0]["initial_lr"] == 0.002
    assert "model.lr is 0.002, as in the checkpoint, and not 0.1, as in the config; --model.lr on the" in caplog.text


def test_another_seed_in_the_midst_of_an_epoch_is_refused(tmp_path: Path, monkeypatch: Any) -> None:
    from involution.engine.command import run

    monkeypatch.chdir(tmp_path)
    assert fit(tmp_path, kill_at=3) is None
    with pytest.raises(ValueError, match=r"seed_everything must be 0, as in the epoch .* got 3"):
        run([*OPTIONS, "--ckpt_path", "last", "--seed_everything", "3"])
    with pytest.raises(ValueError, match=r"number of training images must be 1293, .* got 718"):
        run([*OPTIONS, "--ckpt_path", "last", "--data.val_fraction", "0.5"])
