"""The base class of every task's data module: loaders that resume, and shares of the data for several processes."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSampler
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader, Dataset, Sampler

from .images import cores
from .resume import resume_position
from .sampling import ResumableSampler, SampleSeeded, global_seed

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Preprocessing(Protocol):
    """The preprocessing of evaluation: a NamedTuple of plain values, which a checkpoint stores."""

    def evaluation(self) -> Callable[[Any], Any]:
        """The transform of one decoded image (PIL) to the network's input."""

    def _asdict(self) -> dict[str, Any]: ...


class TaskData(LightningDataModule, ABC):
    """Loaders over `train_set`, `val_set` and `test_set`, which a subclass builds in `setup`; training is shuffled.

    A subclass also has `classes`, the class names, and `preprocessing`; both are stored in checkpoints.

    Args:
        batch_size: images per batch (per process).
        num_workers: loader workers per loader; None shares the machine's cores among its training processes.

    Raises:
        ValueError: a value is too small.
    """

    classes: Sequence[str]
    preprocessing: Preprocessing
    train_set: Dataset[Any]
    val_set: Dataset[Any]
    test_set: Dataset[Any]
    collate: Callable[[list[Any]], Any] | None = None  # makes a batch of samples; None is torch's
    drop_last = False  # drop the incomplete last batch of an epoch
    drop_single = True  # drop a last batch of one image: batch norm needs more values

    def __init__(self, batch_size: int, num_workers: int | None) -> None:
        super().__init__()
        for name, value, minimum in (("batch_size", batch_size, 1), ("num_workers", num_workers or 0, 0)):
            if value < minimum:
                raise ValueError(f"{name} must be at least {minimum}, got {value!r}")
        self.batch_size, self.num_workers = batch_size, num_workers
        self._place = 0, 0  # epoch and batch that training starts at

    @abstractmethod
    def setup(self, stage: str) -> None:
        """Builds the data sets of a stage: "fit" (train_set, val_set), "validate" or "test"."""

    @property
    def num_classes(self) -> int:
        """The number of classes."""
        return len(self.classes)

    @property
    def can_test(self) -> bool:
        """Whether there are images to test on."""
        return True

    def state_dict(self) -> dict[str, Any]:
        """The position in the epoch; Lightning's own record is restored too late for the first loader."""
        epoch, batch = resume_position(self.trainer) if self.trainer else self._place
        shape = {"batch_size": self.batch_size, "processes": self._processes()[0]}
        return {"epoch": epoch, "batch": batch, **shape, **self._order()}

    def _order(self) -> dict[str, Any]:
        """The options that decide the order of an epoch's images, besides the number of processes."""
        train = vars(self).get("train_set")
        return {"seed_everything": global_seed(), "number of training images": None if train is None else len(train)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Makes the next training loader start at the checkpoint's position.

        Raises:
            ValueError: the position is inside an epoch that other options split into batches.
        """
        self._place = state_dict["epoch"], state_dict["batch"]
        then, now = (state_dict["batch_size"], state_dict["processes"]), (self.batch_size, self._processes()[0])
        if self._place[1] and then != now:
            raise ValueError(
                f"batch_size and processes must be {then[0]} and {then[1]}, as in the epoch that the checkpoint is in "
                f"the middle of, got {now[0]} and {now[1]}; a checkpoint from the end of an epoch accepts any"
            )
        for name, value in self._order().items():
            if self._place[1] and name in state_dict and state_dict[name] != value:
                raise ValueError(
                    f"{name} must be {state_dict[name]!r}, as in the epoch that the checkpoint is in the middle of, "
                    f"got {value!r}; a checkpoint from the end of an epoch accepts any"
                )

    def _by_first(self, function: Callable[[], Any]) -> Any:
        """The result (or error) of a function that only the first process runs, so that files are read once."""
        count, rank = self._processes()
        if count == 1:
            return function()
        assert self.trainer is not None
        try:
            found: Any = function() if rank == 0 else None
        except (OSError, ValueError) as error:
            found = error
        found = self.trainer.strategy.broadcast(found)
        if isinstance(found, Exception):
            raise found
        return found

    def _processes(self) -> tuple[int, int]:
        """The number of training processes, and the rank of this one."""
        return (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)

    def _sampler(self, seed: int) -> ResumableSampler:
        """The order of the training set."""
        return ResumableSampler(self.train_set, seed, *self._processes())

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled batches of this process's share of the training set; after a resume, the remaining ones."""
        seed = global_seed()
        sampler = self._sampler(seed)
        if self.drop_last and len(sampler) < self.batch_size:
            raise ValueError(f"batch_size must be at most {len(sampler)}, a process's images, got {self.batch_size}")
        single = self.drop_single and self.batch_size > 1 and len(sampler) % self.batch_size == 1
        if single and len(sampler) == 1:
            raise ValueError("the training set must hold at least two images per process, got one")
        if single and not self.drop_last:
            rank_zero_info(
                f"{len(sampler)} images in batches of {self.batch_size}: each epoch drops its last image, a different "
                "one each time, because a batch of one image has no statistics"
            )
        sampler.resume(self._place[0], self._place[1] * self.batch_size)
        self._place = 0, 0
        return self._loader(SampleSeeded(self.train_set, seed), sampler, self.drop_last or single)

    def val_dataloader(self) -> DataLoader[Any]:
        """Batches of this process's share of the validation set."""
        return self._loader(self.val_set, self._share(self.val_set))

    def test_dataloader(self) -> DataLoader[Any]:
        """Batches of this process's share of the test set."""
        return self._loader(self.test_set, self._share(self.test_set))

    def _share(self, dataset: Any) -> UnrepeatedDistributedSampler | None:
        """Distributes every image exactly once; Lightning's default sampler repeats some."""
        world, rank = self._processes()
        if world == 1:
            return None
        if len(dataset) < world:
            raise ValueError(
                f"the evaluation set must hold at least one image per process, got {len(dataset)} for {world} processes"
            )
        return UnrepeatedDistributedSampler(dataset, world, rank, shuffle=False)

    def _loader(
        self, dataset: Dataset[Any], sampler: Sampler[Any] | None = None, drop_last: bool = False
    ) -> DataLoader[Any]:
        workers = self.num_workers
        if workers is None:
            workers = max(1, cores() // (self.trainer.num_devices if self.trainer else 1))
        return DataLoader(
            dataset,
            batch_size=self.batch_size,
            sampler=sampler,
            drop_last=drop_last,
            collate_fn=self.collate,
            generator=torch.Generator(),  # otherwise making an iterator advances the global generator
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=torch.cuda.is_available(),
        )
