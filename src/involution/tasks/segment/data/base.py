"""What the segmentation data modules share: pairs of images and masks, checked as they are read."""

from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors

from involution.engine.data import IMAGENET_MEAN, IMAGENET_STD, TaskData
from involution.engine.images import FORMATS, UnreadableImage, for_each, inspect, read_image, unreadable
from involution.engine.pictures import Colour, colour

from ..preprocessing import IGNORED, Preprocessing, height_and_width
from .values import PixelValues

Pair = tuple[Path, Path]  # an image and its mask
Sample = tuple[Tensor, Tensor]
MUCH_IGNORED = 0.5  # of all pixels: more is said before training


def read_mask(file: Path, size: tuple[int, int], values: PixelValues) -> Tensor:
    """A mask's classes, [H, W] uint8.

    Args:
        file: an image whose pixels are ids or colours.
        size: width and height that it must have.
        values: the class of every id or colour that may occur.

    Raises:
        UnreadableImage: it cannot be read.
        ValueError: it has another size, several channels where pixels are ids, or another id or colour.
    """
    with unreadable(file, "a mask"), Image.open(file, formats=FORMATS) as image:
        image.load()
    if image.size != size:
        found, wanted = (f"{width}x{height}" for width, height in (image.size, size))
        raise ValueError(f"{file} must have the size of its image (upright, as EXIF says), {wanted}, got {found}")
    return torch.from_numpy(values.apply(image, file))


class TrainingPairs(Dataset[Sample]):
    """Images [3, h, w] with masks [h, w], cut and changed by chance.

    Args:
        pairs: the files.
        values: see `read_mask`.
        transform: of an image and its mask.
    """

    def __init__(self, pairs: Sequence[Pair], values: PixelValues, transform: Any) -> None:
        self.pairs, self.values, self.transform = pairs, values, transform

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Sample:
        image = read_image(self.pairs[index][0])
        mask = read_mask(self.pairs[index][1], image.size, self.values)
        result: Sample = self.transform(tv_tensors.Image(image), tv_tensors.Mask(mask))
        return result


class EvaluationPairs(TrainingPairs):
    """Images [3, h, w] as the network wants them, with masks [H, W] as large as the files."""

    def __getitem__(self, index: int) -> Sample:
        image = read_image(self.pairs[index][0])
        return self.transform(image), read_mask(self.pairs[index][1], image.size, self.values)


def batch(samples: list[Sample]) -> tuple[list[Tensor], list[Tensor]]:
    """Images and masks, each as a list: in evaluation sizes differ."""
    return [image for image, _ in samples], [mask for _, mask in samples]


class SegmentationData(TaskData):
    """Pairs of images and masks; a subclass says which, and has `classes`.

    Batches are (images, masks), lists of [3, h, w] float32 and [H, W] uint8, of class indices or 255 for pixels that
    are ignored. In training all are of the size of `crop`, and every batch is whole; otherwise an image's shorter side
    is `resize`, and its mask is as large as its file. Checkpoints carry classes, palette and preprocessing.

    Args:
        batch_size: images per batch (per process).
        num_workers: loading processes per loader; None shares this machine's cores among its training processes.
        resize: pixels of an image's shorter side, in training before `scale`.
        scale: range of the factor that scales training images.
        crop: height and width of a training image, in pixels; one number for a square.
        max_share: of a crop's known pixels that one class may take; else another crop is tried, ten in all.
        flip: probability of a flip from left to right.
        photometric: change brightness, contrast, saturation and hue of training images by chance.
        check_files: look into all images and masks before training: files that cannot be read, sizes and values that do
            not fit, and classes that never occur are found then.

    Raises:
        ValueError: an argument does not fit.
    """

    collate = staticmethod(batch)
    _remedy = ""  # what to do where masks have other values
    drop_last = True  # one image alone has no statistics where UPerNet pools it to a pixel

    def __init__(
        self,
        batch_size: int = 2,
        num_workers: int | None = None,
        resize: int = 512,
        scale: tuple[float, float] = (0.5, 2.0),
        crop: tuple[int, int] | int = (512, 512),
        max_share: float = 1.0,
        flip: float = 0.5,
        photometric: bool = True,
        check_files: bool = True,
    ) -> None:
        super().__init__(batch_size, num_workers)
        self.check_files = check_files
        crop = height_and_width(crop)
        if min(resize, *crop) < 1:
            raise ValueError(f"resize and crop must be at least 1, got {resize} and {crop}")
        if not 0 < scale[0] <= scale[1]:
            raise ValueError(f"scale must be a range of positive factors, got {scale!r}")
        if not 0 < max_share <= 1:
            raise ValueError(f"max_share must be in 0..1 and not 0, got {max_share!r}")
        if not 0 <= flip <= 1:
            raise ValueError(f"flip must be a probability, got {flip!r}")
        self.preprocessing = Preprocessing(resize, IMAGENET_MEAN, IMAGENET_STD)
        self._training = self.preprocessing.training(scale, crop, max_share, flip, photometric)

    @cached_property
    def palette(self) -> list[Colour]:
        """Every class's colour."""
        return [colour(index) for index in range(1, self.num_classes + 1)]

    @property
    def ids(self) -> dict[int, int]:
        """The class of every id that may occur in a mask file; `IGNORED` is none."""
        return {**{index: index for index in range(self.num_classes)}, IGNORED: IGNORED}

    @property
    def values(self) -> PixelValues:
        """The class of every id or colour that may occur in a mask file."""
        return PixelValues(self.ids)

    def pairs(self, part: str) -> list[Pair]:
        """The files of "train", "val" or "test".

        Raises:
            FileNotFoundError: a file or folder is missing.
        """
        raise NotImplementedError

    def setup(self, stage: str) -> None:
        """Lists what the stage needs."""
        evaluation = self.preprocessing.evaluation()
        if stage == "fit" and self.check_files:
            self._check()
        if stage == "fit":
            self.train_set = TrainingPairs(self.pairs("train"), self.values, self._training)
        if stage in ("fit", "validate"):
            self.val_set = EvaluationPairs(self.pairs("val"), self.values, evaluation)
        if stage == "test":
            self.test_set = EvaluationPairs(self.pairs("test"), self.values, evaluation)

    def _check(self) -> None:
        """Looks into all files to train and validate on, and says what training could not learn from them.

        Raises:
            ValueError: a file cannot be read, an image and its mask do not fit, or one class is left to train on.
        """
        for part in ("train", "val"):
            counts = self._by_first(partial(self._pixels, part))
            known, ignored = counts[: self.num_classes], counts[IGNORED] / counts.sum()
            missing = [name for name, count in zip(self.classes, known, strict=True) if not count]
            if part == "train" and len(missing) >= self.num_classes - 1:
                found = [name for name in self.classes if name not in missing]
                raise ValueError(
                    f"the masks of train must hold pixels of two classes at least, got those of "
                    f"{' '.join(found) or 'none'}, and {ignored:.0%} that are ignored{self._remedy}"
                )
            if missing:
                said = "cannot be learnt" if part == "train" else "have no score"
                rank_zero_warn(
                    f"no pixel in the masks of {part} is of {', '.join(missing)}, which {said}{self._remedy}"
                )
            if ignored > MUCH_IGNORED:
                rank_zero_warn(f"{ignored:.0%} of the pixels in the masks of {part} are ignored{self._remedy}")

    def _pixels(self, part: str) -> np.ndarray:
        """How many pixels of a part are of every class, [256]; the last one counts those that are ignored."""
        total = np.zeros(256, np.int64)
        for found in for_each(self.pairs(part), self._pixels_of, f"files of {part}"):
            if isinstance(found, UnreadableImage):
                raise found
            total += found
        return total

    def _pixels_of(self, pair: Pair) -> np.ndarray:
        image, mask = pair
        classes = read_mask(mask, inspect(image).upright_size, self.values)
        return np.bincount(classes.numpy().ravel(), minlength=256)


def existing(pairs: Sequence[Pair]) -> list[Pair]:
    """The same pairs.

    Raises:
        FileNotFoundError: a file is missing, or there is no pair.
    """
    if not pairs:
        raise FileNotFoundError("root must hold images and masks of every part, got a list without any")
    for image, mask in pairs:
        if not image.is_file():
            raise FileNotFoundError(f"every mask wants an image, got {mask} without {image}")
        if not mask.is_file():
            raise FileNotFoundError(f"every image wants a mask, got {image} without {mask}")
    return list(pairs)
