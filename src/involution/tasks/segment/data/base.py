"""The base of the segmentation data modules: pairs of images and masks, checked when they are read."""

from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

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
MUCH_IGNORED = 0.5  # fraction of pixels; above it, a warning precedes training


def read_mask(file: Path, size: tuple[int, int], values: PixelValues) -> Tensor:
    """The classes of a mask file, [H, W] uint8.

    Args:
        file: an image whose pixels are ids or colours.
        size: its required width and height.
        values: the class of each id or colour that may occur.

    Raises:
        UnreadableImage: the file cannot be read.
        ValueError: its size differs, it has several channels where ids are expected, or an unknown id or colour.
    """
    with unreadable(file, "a mask"), Image.open(file, formats=FORMATS) as image:
        image.load()
    if image.size != size:
        found, wanted = (f"{width}x{height}" for width, height in (image.size, size))
        raise ValueError(
            f"{file} must have the size of its image, {wanted}, got {found}; data.orientation says whether masks "
            "belong to upright images, as EXIF turns them, or to images as they are stored"
        )
    return torch.from_numpy(values.apply(image, file))


class TrainingPairs(Dataset[Sample]):
    """Images [3, h, w] with masks [h, w], randomly cropped and augmented.

    Args:
        pairs: the files.
        values: see `read_mask`.
        transform: of an image and its mask.
        upright: turn images as EXIF says.
    """

    def __init__(self, pairs: Sequence[Pair], values: PixelValues, transform: Any, upright: bool = True) -> None:
        self.pairs, self.values, self.transform, self.upright = pairs, values, transform, upright

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Sample:
        image = read_image(self.pairs[index][0], upright=self.upright)
        mask = read_mask(self.pairs[index][1], image.size, self.values)
        result: Sample = self.transform(tv_tensors.Image(image), tv_tensors.Mask(mask))
        return result


class EvaluationPairs(TrainingPairs):
    """Preprocessed images [3, h, w] with masks [H, W] of the files' size."""

    def __getitem__(self, index: int) -> Sample:
        image = read_image(self.pairs[index][0], upright=self.upright)
        return self.transform(image), read_mask(self.pairs[index][1], image.size, self.values)


def batch(samples: list[Sample]) -> tuple[list[Tensor], list[Tensor]]:
    """Images and masks as lists: in evaluation, sizes differ."""
    return [image for image, _ in samples], [mask for _, mask in samples]


class _Contents(NamedTuple):
    """What a check has found: pixels of each class, and images with an EXIF orientation.

    Only orientations that exchange width and height tell, by the mask's size, which pixels the mask belongs to.
    """

    counts: np.ndarray  # [256]; the last one counts ignored pixels
    turned: int
    telling: int


class SegmentationData(TaskData):
    """Pairs of images and masks; a subclass defines them in `pairs`, and has `classes`.

    Batches are (images, masks), lists of [3, h, w] float32 and [H, W] uint8 with class indices or 255 for ignored
    pixels. In training all have the size of `crop` and every batch is complete; in evaluation an image's shorter side
    is `resize`, and a mask has its file's size. Checkpoints store classes, palette and preprocessing.

    Args:
        batch_size: images per batch (per process).
        num_workers: loader workers per loader; None shares the machine's cores among its training processes.
        resize: pixels of an image's shorter side, in training before `scale`.
        scale: range of the factor that scales training images.
        crop: height and width of a training image, in pixels; one number means a square.
        max_share: largest share of a single class among a crop's known pixels; at most ten crops are tried.
        flip: probability of a horizontal flip.
        photometric: random brightness, contrast, saturation and hue of training images.
        orientation: masks belong to "upright" images, as EXIF turns them, or to images as they are "stored".
        check_files: before training, read all masks and all images' headers, to find unreadable files, sizes and values
            that do not fit, and classes that never occur.

    Raises:
        ValueError: an argument does not fit.
    """

    collate = staticmethod(batch)
    _remedy = ""  # the end of errors about unexpected mask values
    drop_last = True  # a single image has no statistics where UPerNet pools it to one pixel

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
        orientation: str = "upright",
        check_files: bool = True,
    ) -> None:
        super().__init__(batch_size, num_workers)
        if orientation not in ("upright", "stored"):
            raise ValueError(f"orientation must be upright or stored, got {orientation!r}")
        self.check_files, self._upright = check_files, orientation == "upright"
        self.crop = crop = height_and_width(crop)
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
        """The colour of each class."""
        return [colour(index) for index in range(1, self.num_classes + 1)]

    @property
    def ids(self) -> dict[int, int]:
        """The class of each id that may occur in a mask file; `IGNORED` means none."""
        return {**{index: index for index in range(self.num_classes)}, IGNORED: IGNORED}

    @property
    def values(self) -> PixelValues:
        """The class of each id or colour that may occur in a mask file."""
        return PixelValues(self.ids)

    def pairs(self, part: str) -> list[Pair]:
        """The files of "train", "val" or "test".

        Raises:
            FileNotFoundError: a file or folder is missing.
        """
        raise NotImplementedError

    def setup(self, stage: str) -> None:
        """Lists the pairs of the stage."""
        evaluation = self.preprocessing.evaluation()
        if stage == "fit" and self.check_files:
            self._check()
        if stage == "fit":
            self.train_set = TrainingPairs(self.pairs("train"), self.values, self._training, self._upright)
        if stage in ("fit", "validate"):
            self.val_set = EvaluationPairs(self.pairs("val"), self.values, evaluation, self._upright)
        if stage == "test":
            self.test_set = EvaluationPairs(self.pairs("test"), self.values, evaluation, self._upright)

    def _check(self) -> None:
        """Checks all files of training and validation, and warns of missing classes and many ignored pixels.

        Raises:
            ValueError: a file cannot be read, an image and its mask do not fit, or only one class occurs in training.
        """
        for part in ("train", "val"):
            counts, turned, telling = self._by_first(partial(self._contents, part))
            if turned and not telling:
                rank_zero_warn(
                    f"{turned} images of {part} have an EXIF orientation, and no size tells whether masks belong to "
                    f"upright images or to images as they are stored: data.orientation is "
                    f"{'upright' if self._upright else 'stored'}"
                )
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

    def _contents(self, part: str) -> _Contents:
        """What the files of a part hold together."""
        counts, turned, telling = np.zeros(256, np.int64), 0, 0
        for found in for_each(self.pairs(part), self._contents_of, f"files of {part}"):
            if isinstance(found, UnreadableImage):
                raise found
            counts += found.counts
            turned += found.turned
            telling += found.telling
        return _Contents(counts, turned, telling)

    def _contents_of(self, pair: Pair) -> _Contents:
        header = inspect(pair[0])
        classes = read_mask(pair[1], header.upright_size if self._upright else header.size, self.values)
        counts = np.bincount(classes.numpy().ravel(), minlength=256)
        return _Contents(counts, header.orientation > 1, header.size != header.upright_size)


def existing(pairs: Sequence[Pair]) -> list[Pair]:
    """The same pairs, after checking that their files exist.

    Raises:
        FileNotFoundError: a file is missing, or there is no pair.
    """
    if not pairs:
        raise FileNotFoundError("root must hold images and masks of every part, got an empty list")
    for image, mask in pairs:
        if not image.is_file():
            raise FileNotFoundError(f"every mask must have an image, got {mask} without {image}")
        if not mask.is_file():
            raise FileNotFoundError(f"every image must have a mask, got {image} without {mask}")
    return list(pairs)
