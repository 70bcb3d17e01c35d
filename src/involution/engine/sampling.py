"""Data order and random numbers that a resumed run reproduces.

Which samples an epoch has in which order depends on (seed, epoch); the augmentation of a sample on (seed, epoch, index)
alone. The sampler skips the batches done before the checkpoint, each sample's augmentation uses generators seeded with
its own key, and the checkpoint contains the states of the global generators (of rank 0; see RandomStates).
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

SampleKey = int | tuple[int, int]  # a sample's index, or its epoch and index


def global_seed() -> int:
    """The argument of seed_everything, or 0."""
    return int(os.environ.get("PL_GLOBAL_SEED", "0"))


class ResumableSampler(DistributedSampler[Any]):
    """Yields (epoch, index) of each sample once per epoch (except padding), shuffled by (seed, epoch).

    Processes split an epoch; padding repeats a few samples where they do not divide it evenly.

    Args:
        dataset: the data set; only its length is used.
        seed: of the order.
        replicas: number of processes that share an epoch; if it does not divide evenly, a few indices occur twice.
        rank: of this process.
    """

    def __init__(self, dataset: Dataset[Any], seed: int, replicas: int = 1, rank: int = 0) -> None:
        super().__init__(dataset, num_replicas=replicas, rank=rank, shuffle=True, seed=seed)
        self._resumed = (0, 0)  # epoch, and the number of its indices already done

    def resume(self, epoch: int, seen: int) -> None:
        """Makes one epoch start after this process's first `seen` indices; other epochs are complete."""
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
    """A data set whose augmentation of sample (epoch, index) is the same at any time and in any worker.

    A plain index means epoch 0.
    """

    def __init__(self, dataset: Any, seed: int) -> None:
        self.dataset, self.seed = dataset, seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: SampleKey) -> Any:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        with _seeded_rng(self.seed, epoch, index):
            return self.dataset[index]


@contextmanager
def _seeded_rng(*key: int) -> Iterator[None]:
    """Seeds the generators of torch, NumPy and Python with `key`, and restores their states afterwards.

    The default dtype is float32 meanwhile: with precision 64-true, Lightning sets float64 around part of the loading
    only, which would change what torch samples.
    """
    before, dtype = _states(), torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float32)
        seeds = np.random.SeedSequence(key).generate_state(3)
        torch.default_generator.manual_seed(int(seeds[0]))  # the CPU's only: workers must not initialise a GPU
        np.random.seed(seeds[1])
        random.seed(int(seeds[2]))
        yield
    finally:
        _restore(before)
        torch.set_default_dtype(dtype)


def _states() -> dict[str, Any]:
    name, numbers, *rest = np.random.get_state()  # as a list: checkpoints load tensors and plain values only
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
    """Stores the states of all random number generators in the checkpoint, and restores them on resume.

    With one process, a run resumes bit-exactly. With several, Lightning stores the states of rank 0 only, and on resume
    every process starts from them: data order and augmentation still resume bit-exactly, because they depend on the
    seed alone, but dropout, drop path and mixup of the other processes differ from the uninterrupted run's and equal
    rank 0's.
    """

    def __init__(self) -> None:
        self._loaded: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        """States of torch, its GPUs, NumPy and Python."""
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        return _states() | {"cuda": cuda, "seed": global_seed()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keeps the states until training starts: building models and loaders uses random numbers too."""
        self._loaded = state_dict

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restores the checkpoint's states, unless this run has another seed."""
        if self._loaded is not None and self._loaded.get("seed", global_seed()) == global_seed():
            _restore(self._loaded)
            if len(self._loaded["cuda"]) == torch.cuda.device_count() > 0:
                torch.cuda.set_rng_state_all(self._loaded["cuda"])
        self._loaded = None
