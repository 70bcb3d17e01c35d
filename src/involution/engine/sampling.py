"""Data order and random numbers that a resume reproduces.

What a training step sees depends on (seed, epoch, index) alone: the sampler skips the batches that a checkpoint has
seen, every sample takes its augmentation from a generator seeded with its own key, and the states of the global
generators are part of the checkpoint.
"""

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
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


class SampleSeeded(Dataset[Any]):
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
