"""Images sorted into folders: root/{train,val,test}/class/*.jpg."""

import multiprocessing
import warnings
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from torchvision import datasets
from torchvision.transforms import v2

from .data import IMAGENET_MEAN, IMAGENET_STD, ClassificationData, normalised
from .images import read_image


class _Skipping(datasets.ImageFolder):
    """In the place of a file that cannot be read comes the next one that can; `skipped` counts, in all processes."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.skipped = multiprocessing.Value("l", 0)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        for number in range(len(self)):
            try:
                return super().__getitem__((index + number) % len(self))
            except ValueError as error:
                with self.skipped.get_lock():
                    self.skipped.value += 1
                warnings.warn(f"skipped: {error}", RuntimeWarning, stacklevel=1)
        raise ValueError(f"none of the {len(self)} files in {self.root} can be read as an image")


class ImageFolder(ClassificationData):
    """Any tree root/{train,val,test}/class/image; the classes are the folders of root/train, in alphabetical order.

    Training images are cropped at random (area 8 % to 100 %, resized to `image_size`) and flipped; the others are
    resized so that the shorter side is `resize` and cropped at the centre. `test` is needed for testing and
    predicting only.

    Args:
        root: the tree.
        batch_size: images per batch (per process).
        num_workers: loading processes per loader.
        image_size: height and width that the model gets, in pixels.
        resize: the shorter side before the centre crop, in pixels.
        on_error: "raise" where a file cannot be read, or "skip": its place is taken by the next one that can be, and a
            warning names it.

    Raises:
        FileNotFoundError: a folder is missing, or a class folder holds no image.
        ValueError: root/train holds no class folder; the classes of val or test are not those of train; on_error is
            neither; a file cannot be read (when it is needed).
    """

    test_set: datasets.ImageFolder

    def __init__(
        self,
        root: str,
        batch_size: int = 64,
        num_workers: int = 2,
        image_size: int = 224,
        resize: int = 256,
        on_error: str = "raise",
    ) -> None:
        super().__init__(batch_size, num_workers)
        if on_error not in ("raise", "skip"):
            raise ValueError(f"on_error must be raise or skip, got {on_error!r}")
        self.root, self.image_size, self.resize, self.on_error = Path(root), image_size, resize, on_error

    @cached_property
    def classes(self) -> list[str]:  # type: ignore[override]  # read when asked for, so that making the object is free
        """The folders of root/train."""
        return self._class_folders("train")

    def setup(self, stage: str) -> None:
        """Lists what the stage needs: training and validation, or test."""
        centre = [v2.Resize(self.resize), v2.CenterCrop(self.image_size)]
        if stage == "fit":
            self.train_set = self._read("train", [v2.RandomResizedCrop(self.image_size), v2.RandomHorizontalFlip()])
        if stage in ("fit", "validate"):
            self.val_set = self._read("val", centre)
        else:
            self.test_set = self._read("test", centre)

    def teardown(self, stage: str) -> None:
        """Says how often a file was skipped."""
        sets = [vars(self).get(f"{part}_set") for part in ("train", "val", "test")]
        count = sum(part.skipped.value for part in sets if isinstance(part, _Skipping))
        if count:
            rank_zero_warn(f"{stage} skipped {count} samples whose files cannot be read (on_error=skip)")

    def image_names(self) -> list[str]:
        """Paths of the test images below `root`."""
        return [str(Path(path).relative_to(self.root)) for path, _ in self.test_set.samples]

    def _read(self, split: str, steps: Sequence[v2.Transform]) -> datasets.ImageFolder:
        found = self._class_folders(split)
        if found != self.classes:
            missing, extra = sorted(set(self.classes) - set(found)), sorted(set(found) - set(self.classes))
            raise ValueError(
                f"root must hold the same classes in {split} as in train, got {self.root}: "
                f"{split} lacks {missing or 'none'} and has besides {extra or 'none'}"
            )
        transform = normalised(v2.ToImage(), *steps, mean=IMAGENET_MEAN, std=IMAGENET_STD)
        read: type[datasets.ImageFolder] = _Skipping if self.on_error == "skip" else datasets.ImageFolder
        return read(self.root / split, transform, loader=read_image)

    def _class_folders(self, split: str) -> list[str]:
        folder = self.root / split
        if not folder.is_dir():
            raise FileNotFoundError(f"root must hold a folder {split!r} of class folders, got {self.root}: no {folder}")
        found = sorted(path.name for path in folder.iterdir() if path.is_dir())
        if not found:
            raise ValueError(f"root must hold a folder per class in {split!r}, got {self.root}: {folder} has none")
        return found
