"""What the data modules of every task share: loaders that resume, and parts for several processes."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSampler
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader, Dataset, Sampler

from .images import cores
from .resume import place_in_epoch
from .sampling import ResumableSampler, SampleSeeded, global_seed

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class TaskData(LightningDataModule):
    """Loaders over `train_set`, `val_set` and `test_set`, which a subclass makes in `setup`; only training is shuffled.

    Args:
        batch_size: images per batch (per process).
        num_workers: loading processes per loader; None shares this machine's cores among its training processes.

    Raises:
        ValueError: a number is too small.
    """

    classes: Sequence[str]  # their names
    train_set: Dataset[Any]
    val_set: Dataset[Any]
    test_set: Dataset[Any]
    collate: Callable[[list[Any]], Any] | None = None  # makes a batch of samples; None is torch's
    drop_last = False  # leave out the images of an epoch that make no whole batch
    drop_single = True  # leave out an epoch's last image where it would be a batch alone: batch norms want more values

    def __init__(self, batch_size: int, num_workers: int | None) -> None:
        super().__init__()
        for name, value, least in (("batch_size", batch_size, 1), ("num_workers", num_workers or 0, 0)):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value!r}")
        self.batch_size, self.num_workers = batch_size, num_workers
        self._place = 0, 0  # epoch and batch that training begins with

    @property
    def num_classes(self) -> int:
        """How many classes there are."""
        return len(self.classes)

    def state_dict(self) -> dict[str, Any]:
        """Where in which epoch a checkpoint is made; Lightning's own record is read too late for the first loader."""
        epoch, batch = place_in_epoch(self.trainer) if self.trainer else self._place
        shape = {"batch_size": self.batch_size, "processes": self._processes()[0]}
        return {"epoch": epoch, "batch": batch, **shape, **self._order()}

    def _order(self) -> dict[str, Any]:
        """What decides the order of an epoch's images, besides the number of processes, by option."""
        train = vars(self).get("train_set")
        return {"seed_everything": global_seed(), "number of training images": None if train is None else len(train)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Has the next training loader begin there.

        Raises:
            ValueError: it is in the midst of an epoch that was dealt out in other batches.
        """
        self._place = state_dict["epoch"], state_dict["batch"]
        then, now = (state_dict["batch_size"], state_dict["processes"]), (self.batch_size, self._processes()[0])
        if self._place[1] and then != now:
            raise ValueError(
                f"batch_size and processes must be {then[0]} and {then[1]}, as in the epoch that the checkpoint is in "
                f"the midst of, got {now[0]} and {now[1]}; a checkpoint of an epoch's end takes any"
            )
        for name, value in self._order().items():
            if self._place[1] and name in state_dict and state_dict[name] != value:
                raise ValueError(
                    f"{name} must be {state_dict[name]!r}, as in the epoch that the checkpoint is in the midst of, got "
                    f"{value!r}; a checkpoint of an epoch's end takes any"
                )

    def _by_first(self, function: Callable[[], Any]) -> Any:
        """What a function returns or raises that the first process alone calls: files are then read once."""
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
        """How many there are, and which of them this is."""
        return (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)

    def _sampler(self, seed: int) -> ResumableSampler:
        """The order of the training set."""
        return ResumableSampler(self.train_set, seed, *self._processes())

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled batches of the training set, of this process's part; after a resume, those that are left."""
        seed = global_seed()
        sampler = self._sampler(seed)
        if self.drop_last and len(sampler) < self.batch_size:
            raise ValueError(f"batch_size must be at most {len(sampler)}, a process's images, got {self.batch_size}")
        alone = self.drop_single and self.batch_size > 1 and len(sampler) % self.batch_size == 1
        if alone and len(sampler) == 1:
            raise ValueError("the training set must hold two images at least for every process, got one")
        if alone and not self.drop_last:
            rank_zero_info(
                f"{len(sampler)} images in batches of {self.batch_size}: the last one of every epoch, another each "
                "time, is left out, for a batch of one image has no statistics"
            )
        sampler.resume(self._place[0], self._place[1] * self.batch_size)
        self._place = 0, 0
        return self._loader(SampleSeeded(self.train_set, seed), sampler, self.drop_last or alone)

    def val_dataloader(self) -> DataLoader[Any]:
        """Batches of the validation set, of this process's part."""
        return self._loader(self.val_set, self._share(self.val_set))

    def test_dataloader(self) -> DataLoader[Any]:
        """Batches of the test set, of this process's part."""
        return self._loader(self.test_set, self._share(self.test_set))

    def _share(self, dataset: Any) -> UnrepeatedDistributedSampler | None:
        """Every image once in all processes together; Lightning's own sampler would repeat some of them."""
        world, rank = self._processes()
        if world == 1:
            return None
        if len(dataset) < world:
            raise ValueError(f"every process wants an image to evaluate on, got {len(dataset)} for {world} processes")
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
            generator=torch.Generator(),  # or making an iterator would draw from the global one
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=torch.cuda.is_available(),
        )
