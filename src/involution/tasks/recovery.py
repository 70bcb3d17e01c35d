"""Runs that survive: the same data and random numbers after a resume, checkpoints that are whole or not there.

What a training step sees depends on (seed, epoch, index) alone, never on how the run came there: the sampler skips the
batches that a checkpoint has seen, every sample draws its augmentation from a generator of its own, and the states of
the global generators travel in the checkpoint.
"""

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping
from torch.utils.data import Dataset, DistributedSampler

Key = int | tuple[int, int]  # of a sample: its index, or its epoch and index


def global_seed() -> int:
    """What seed_everything was given, or 0."""
    return int(os.environ.get("PL_GLOBAL_SEED", "0"))


class ResumableSampler(DistributedSampler[Any]):
    """Every index once an epoch, in an order that (seed, epoch) decide, as (epoch, index); parts for several processes.

    Args:
        dataset: what the indices are of.
        seed: of the order.
        replicas: how many processes share an epoch; the last ones may get a few indices twice.
        rank: which of them this is.
    """

    def __init__(self, dataset: Dataset[Any], seed: int, replicas: int = 1, rank: int = 0) -> None:
        super().__init__(dataset, num_replicas=replicas, rank=rank, shuffle=True, seed=seed)
        self._resumed = (0, 0)  # epoch, and how many of its indices have been seen

    def resume(self, epoch: int, seen: int) -> None:
        """Starts in the midst of an epoch, after this process's first `seen` indices; other epochs are whole."""
        self.set_epoch(epoch)
        self._resumed = epoch, seen

    def order(self) -> list[int]:
        """This process's indices of the epoch."""
        return list(super().__iter__())

    def __iter__(self) -> Iterator[Any]:
        epoch, seen = self._resumed
        for index in self.order()[seen if self.epoch == epoch else 0 :]:
            yield self.epoch, index


class Seeded(Dataset[Any]):
    """A data set whose sample (epoch, index) draws the same random numbers whenever and in whatever process it is read.

    A plain index is a sample of epoch 0.
    """

    def __init__(self, dataset: Any, seed: int) -> None:
        self.dataset, self.seed = dataset, seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: Key) -> Any:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        with _random_numbers_of(self.seed, epoch, index):
            return self.dataset[index]


@contextmanager
def _random_numbers_of(*key: int) -> Iterator[None]:
    """torch, NumPy and Python draw from generators that `key` seeds; afterwards from where they were.

    torch draws float32: with precision 64-true, Lightning changes the default for some batches and not for others.
    """
    before, dtype = _states(), torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    seeds = np.random.SeedSequence(key).generate_state(3)
    torch.default_generator.manual_seed(int(seeds[0]))  # the CPU's alone: workers must not touch a GPU
    np.random.seed(seeds[1])
    random.seed(int(seeds[2]))
    try:
        yield
    finally:
        _restore(before)
        torch.set_default_dtype(dtype)


def _states() -> dict[str, Any]:
    name, numbers, *rest = np.random.get_state()  # as a list: a checkpoint loads tensors and plain values only
    return {
        "torch": torch.get_rng_state(),
        "numpy": (name, np.asarray(numbers).tolist(), *rest),
        "python": random.getstate(),
    }


def _restore(states: dict[str, Any]) -> None:
    torch.set_rng_state(states["torch"])
    np.random.set_state(states["numpy"])
    random.setstate(states["python"])


class RandomStates(Callback):
    """Keeps the states of all generators of random numbers in the checkpoint, and goes on from them."""

    def __init__(self) -> None:
        self._loaded: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        """Of torch, its GPUs, NumPy and Python."""
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        return _states() | {"cuda": cuda, "seed": global_seed()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keeps them until training starts: making models and loaders draws numbers too."""
        self._loaded = state_dict

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restores what the checkpoint holds, unless this run was given another seed."""
        if self._loaded is not None and self._loaded.get("seed", global_seed()) == global_seed():
            _restore(self._loaded)
            if len(self._loaded["cuda"]) == torch.cuda.device_count() > 0:
                torch.cuda.set_rng_state_all(self._loaded["cuda"])
        self._loaded = None


class GivenOptions(Callback):
    """Keeps options in force that Lightning takes from the checkpoint on resume.

    These are the learning rate, momentum and weight decay, which are in the optimizer's and the schedule's states, and
    the patience of early stopping. The step that the schedule is at stays the checkpoint's.
    """

    def __init__(self) -> None:
        self._patience: list[tuple[EarlyStopping, int]] = []
        self._groups: list[list[dict[str, Any]]] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Notes the patience, before callbacks are restored."""
        stopping: list[Any] = [one for one in trainer.callbacks if isinstance(one, EarlyStopping)]  # type: ignore[attr-defined]
        self._patience = [(one, one.patience) for one in stopping]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Notes the optimizers' options, before they are restored."""
        self._groups = [
            [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
            for optimizer in trainer.optimizers
        ]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Puts them back."""
        for stopping, patience in self._patience:
            stopping.patience = patience
        schedules: list[Any] = [config.scheduler for config in trainer.lr_scheduler_configs]
        multiples = [one for one in schedules if isinstance(one, torch.optim.lr_scheduler.LambdaLR)]
        # Another kind of schedule computes rates from those before: they stay the checkpoint's.
        rates = {"lr", "initial_lr"} if len(multiples) < len(schedules) else set()
        for optimizer, groups in zip(trainer.optimizers, self._groups, strict=True):
            for group, given in zip(optimizer.param_groups, groups, strict=False):  # finetuning callbacks add groups
                group.update({name: value for name, value in given.items() if name not in rates})
        for schedule in multiples:
            groups = schedule.optimizer.param_groups
            schedule.base_lrs = [group["initial_lr"] for group in groups]
            for group, base, factor in zip(groups, schedule.base_lrs, schedule.lr_lambdas, strict=False):
                group["lr"] = base * factor(schedule.last_epoch)
            schedule._last_lr = [group["lr"] for group in groups]


class WholeEpochs(Callback):
    """Counts the epochs of runs whose length is a number of steps as if they had not been interrupted.

    Lightning takes an epoch that the checkpoint finished for one to go on with, finds it without batches, and counts it
    twice; and one that the last step broke off for finished. The images' order would be another one.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Says whether anything is left of the checkpoint's epoch."""
        loop: Any = trainer.fit_loop
        progress = loop.epoch_progress
        if not loop.epoch_loop.batch_progress.is_last_batch:
            progress.current.processed = min(progress.current.processed, progress.current.completed)
            progress.total.processed = min(progress.total.processed, progress.total.completed)
        elif loop.restarted_on_epoch_end:
            loop.epoch_progress.increment_completed()
            loop.reset_restart_stage()
            loop._restarting = loop.epoch_loop._restarting = False


class WholeCheckpoints(TorchCheckpointIO):
    """Writes checkpoints beside their place and moves them there when they are on disk: never half of one.

    A write that fails raises its error and leaves what was there before.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Writes, flushes to the disk, renames."""
        if "://" in str(path):  # not a file of this machine: as Lightning does it
            return super().save_checkpoint(checkpoint, path, storage_options)
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f".{target.name}.part")
        try:
            with part.open("wb") as stream:
                torch.save(checkpoint, stream)
                stream.flush()
                os.fsync(stream.fileno())
            part.replace(target)
        finally:
            part.unlink(missing_ok=True)
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the rename too
        finally:
            os.close(folder)
        return None


def place_in_epoch(trainer: Trainer) -> tuple[int, int]:
    """The epoch that training would go on with now, and how many of its batches it has seen."""
    epochs: Any = trainer.fit_loop.epoch_progress.current
    batches = trainer.fit_loop.epoch_loop.batch_progress
    if epochs.ready == 0:
        return 0, 0
    return (epochs.ready, 0) if batches.is_last_batch else (epochs.ready - 1, batches.current.ready)


def last_checkpoint(folder: Path) -> Path:
    """The newest last.ckpt of the runs in a folder: in version_N/checkpoints or, without a logger, in checkpoints.

    Raises:
        FileNotFoundError: there is none.
    """
    found = [path for place in ("version_*/checkpoints", "checkpoints") for path in folder.glob(f"{place}/last.ckpt")]
    found.sort(key=lambda path: path.stat().st_mtime)
    if not found:
        raise FileNotFoundError(f"ckpt_path last: no version_*/checkpoints/last.ckpt in {folder}")
    return found[-1]
