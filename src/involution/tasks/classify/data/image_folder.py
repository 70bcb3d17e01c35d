"""Images of any size: the base of data sets of photographs, and trees of class folders."""

from functools import cached_property, partial
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import Subset
from torchvision import datasets
from torchvision.transforms import v2

from involution.engine.data import IMAGENET_MEAN, IMAGENET_STD
from involution.engine.files import entries, is_hidden
from involution.engine.images import ENDINGS, SkipUnreadable, UnreadableImage, for_each, inspect, read_image

from ..preprocessing import Preprocessing, random_crops
from .base import ClassificationData


class Photographs(ClassificationData):
    """Images of any size: random crops in training, centre crops in evaluation.

    Args:
        batch_size: images per batch (per process).
        num_workers: loader workers per loader; None shares the machine's cores among its training processes.
        image_size: height and width of the network's input, in pixels.
        resize: the shorter side before the centre crop, in pixels.
        auto_augment: a policy in timm's notation for the training images, such as rand-m9-mstd0.5-inc1.
        random_erasing: probability that a rectangle of a training image is replaced by noise.
        on_error: for a file that cannot be read: "raise", or "skip" to train on the next readable one instead, after a
            warning. Evaluation is on all files or none.

    Raises:
        ValueError: an argument does not fit.
    """

    def __init__(
        self,
        batch_size: int = 64,
        num_workers: int | None = None,
        image_size: int = 224,
        resize: int = 256,
        auto_augment: str | None = None,
        random_erasing: float = 0.0,
        on_error: str = "raise",
    ) -> None:
        super().__init__(batch_size, num_workers)
        if on_error not in ("raise", "skip"):
            raise ValueError(f"on_error must be raise or skip, got {on_error!r}")
        for name, value in (("image_size", image_size), ("resize", resize)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value!r}")
        self.on_error = on_error
        self.preprocessing = Preprocessing(image_size, resize, IMAGENET_MEAN, IMAGENET_STD)
        self._training = random_crops(self.preprocessing, auto_augment, random_erasing)

    def setup(self, stage: str) -> None:
        """Lists the images of the stage: training and validation, or test."""
        if stage == "fit":
            self.train_set = self._guarded(self._read("train", self._training))
        if stage in ("fit", "validate"):
            self.val_set = self._read("val", self.preprocessing.evaluation())
        if stage == "test":
            self.test_set = self._read("test", self.preprocessing.evaluation())

    def teardown(self, stage: str) -> None:
        """Warns of the number of files skipped in all processes."""
        train = vars(self).get("train_set")
        count = int(self._anywhere(train.broken).sum()) if isinstance(train, SkipUnreadable) else 0
        if count:
            rank_zero_warn(f"{count} files could not be read and were skipped (on_error=skip)")

    def _anywhere(self, flags: Tensor) -> Tensor:
        """1 where a flag of any process is 1."""
        if self.trainer is None or self.trainer.world_size == 1:
            return flags
        strategy = self.trainer.strategy
        found: Tensor = strategy.reduce(flags.to(strategy.root_device), reduce_op="max")
        return found

    def _guarded(self, dataset: Any) -> Any:
        return SkipUnreadable(dataset) if self.on_error == "skip" else dataset

    def _read(self, split: str, transform: v2.Transform) -> Any:
        """The images of "train", "val" or "test", with the transform, as a map-style data set."""
        raise NotImplementedError


class _ClassFolders(datasets.ImageFolder):
    """torchvision's data set, without hidden folders."""

    def find_classes(self, directory: str | Path) -> tuple[list[str], dict[str, int]]:
        """The names of the class folders, and the label of each."""
        names = [path.name for path in entries(Path(directory)) if path.is_dir()]
        return names, {name: label for label, name in enumerate(names)}


class ImageFolder(Photographs):
    """Any tree root/{train,val,test}/class/image; the classes are the folders of root/train, in alphabetical order.

    Files and folders whose names begin with a dot are skipped.

    Training images are cropped at random (area 8 % to 100 %, resized to `image_size`) and flipped; the others are
    resized so that the shorter side is `resize` and cropped at the centre. `test` is needed for testing only.

    Args:
        root: the tree.
        check_files: before training, check that every image file has a readable header and is complete. That takes
            about 0.1 ms of one core per file (two minutes for a million), more on slow file systems. With on_error
            "skip", broken files are left out of training.
        **photographs: see `Photographs`.

    Raises:
        FileNotFoundError: a folder is missing, or a class folder holds no image.
        ValueError: root/train holds no class folder; a file in a class folder is no image or cannot be read (on_error
            "raise"); no image of a class can be read; the classes of val or test are not those of train; another
            argument does not fit.
    """

    def __init__(
        self,
        root: str,
        check_files: bool = True,
        **photographs: Any,
    ) -> None:
        super().__init__(**photographs)
        self.root, self.check_files = Path(root), check_files

    def setup(self, stage: str) -> None:
        """Lists the images of the stage, and checks those of training and validation before training."""
        super().setup(stage)
        if stage == "fit" and self.check_files:
            self._check("train", self.train_set)
            self._check("val", self.val_set)

    def _check(self, split: str, dataset: Any) -> None:
        """Raises at the first broken file, or leaves broken ones out of training."""
        images = dataset.dataset if isinstance(dataset, SkipUnreadable) else dataset
        broken: dict[int, str] = self._by_first(partial(_broken, images, split))
        if not broken:
            return
        first = next(iter(broken.values()))
        if self.on_error == "raise":
            raise UnreadableImage(f"{first}; on_error=skip leaves such files out of training")
        if split != "train":
            raise UnreadableImage(f"{first}; on_error=skip leaves images out of training, and none out of evaluation")
        kept = [index for index in range(len(images)) if index not in broken]
        lost = set(range(self.num_classes)) - {images.targets[index] for index in kept}
        if lost:
            raise UnreadableImage(f"no image of {self.classes[min(lost)]} can be read: {first}")
        rank_zero_warn(f"left out {len(broken)} images, the first: {first} (on_error=skip)")
        self.train_set = self._guarded(Subset(images, kept))

    @cached_property
    def classes(self) -> list[str]:  # type: ignore[override]  # read on first use, so that construction reads no files
        """The folders of root/train."""
        return self._class_folders("train")

    @property
    def can_test(self) -> bool:
        """Whether there is a folder of test images."""
        return self._folder("test").is_dir()

    def _folder(self, split: str) -> Path:
        return self.root / split

    def _read(self, split: str, transform: v2.Transform) -> datasets.ImageFolder:
        wanted, found = self._class_folders("train"), self._class_folders(split)
        if found != wanted:
            missing, extra = sorted(set(wanted) - set(found)), sorted(set(found) - set(wanted))
            raise ValueError(
                f"root must hold the same classes in {split} as in train, got {self.root}: "
                f"{split} lacks {missing or 'none'} and has besides {extra or 'none'}"
            )
        return self._images(self._folder(split), transform)

    def _images(self, folder: Path, transform: v2.Transform) -> datasets.ImageFolder:
        """torchvision's data set; it ignores files that are no images, here they raise or are counted."""
        others: list[str] = []

        def is_image(path: str) -> bool:
            if is_hidden(Path(path).relative_to(folder)):
                return False
            image = path.lower().endswith(ENDINGS)
            if not image:
                others.append(path)
            return image

        try:
            found = _ClassFolders(folder, transform, loader=read_image, is_valid_file=is_image)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"root must hold images of every class, got {folder}: {error}") from error
        if others and self.on_error == "raise":
            raise ValueError(f"{others[0]} is no image ({', '.join(ENDINGS)}); on_error=skip leaves such files out")
        if others:
            rank_zero_warn(f"left out {len(others)} files that are no images, {others[0]} the first (on_error=skip)")
        return found

    def _class_folders(self, split: str) -> list[str]:
        folder = self._folder(split)
        if not folder.is_dir():
            raise FileNotFoundError(f"root must hold a folder {split!r} of class folders, got {self.root}: no {folder}")
        found = [path.name for path in entries(folder) if path.is_dir()]
        if not found:
            raise ValueError(f"root must hold a folder per class in {split!r}, got {self.root}: {folder} has none")
        return found


def _broken(images: datasets.ImageFolder, split: str) -> dict[int, str]:
    """Index and error of every image file that is not complete."""
    files = [Path(file) for file, _ in images.samples]
    results = for_each(files, inspect, f"images of {split}")
    return {index: str(found) for index, found in enumerate(results) if isinstance(found, UnreadableImage)}
