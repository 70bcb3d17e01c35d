"""The images of a part of the data with their objects: what a training and an evaluation sample hold."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors

from involution.engine.images import read_image

from ..annotations import AnnotationError, Annotations, ImageEntry
from ..annotations.run_lengths import mask_of
from ..preprocessing import to_tensor
from ..targets import Targets

Sample = tuple[Tensor, dict[str, Any]]


class Split(NamedTuple):
    """A part of the data: its image folder, its annotations, and whether boxes are in the pixels of upright images."""

    folder: Path
    annotations: Annotations
    upright: bool = True


class TrainingImages(Dataset[Sample]):
    """Images [3, H, W] with boxes [n, 4] (left, top, right, bottom), labels [n] from 1 on and, if `masks`, masks.

    Crowds are left out.
    """

    def __init__(self, split: Split, images: Sequence[ImageEntry], transform: Any, masks: bool) -> None:
        self.split, self.images, self.transform, self.masks = split, images, transform, masks
        self._labels = {category: label for label, category in enumerate(split.annotations.categories, start=1)}

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Sample:
        entry = self.images[index]
        image = read(self.split, entry)
        objects = [one for one in self.split.annotations.objects[entry.id] if not one.crowd]
        size = (entry.height, entry.width)
        corners = torch.tensor([one.corners for one in objects], dtype=torch.float32).reshape(-1, 4)
        target: dict[str, Any] = {
            "boxes": tv_tensors.BoundingBoxes(corners, format="XYXY", canvas_size=size),
            "labels": torch.tensor([self._labels[one.category] for one in objects], dtype=torch.int64),
        }
        if self.masks:
            shapes = [torch.from_numpy(mask_of(one, size)) for one in objects]
            target["masks"] = tv_tensors.Mask(torch.stack(shapes) if shapes else torch.zeros(0, *size).byte())
        result: Sample = self.transform(image, target)
        return result


class EvaluationImages(Dataset[Sample]):
    """Images [3, H, W] in 0..1, of their own size, with their image_id."""

    def __init__(self, split: Split) -> None:
        self.split, self.transform = split, to_tensor()

    def __len__(self) -> int:
        return len(self.split.annotations.images)

    def __getitem__(self, index: int) -> Sample:
        entry = self.split.annotations.images[index]
        return self.transform(read(self.split, entry)), {"image_id": entry.id}


def read(split: Split, entry: ImageEntry) -> Any:
    """An image as RGB, in the pixels that its boxes are in.

    Raises:
        AnnotationError: it has another size than the annotation file says.
        UnreadableImage: it cannot be read.
    """
    file = split.folder / entry.file
    image = read_image(file, upright=split.upright)
    if image.size != (entry.width, entry.height):
        raise another_size(entry, file, image.size)
    return image


def another_size(entry: ImageEntry, file: Path, size: tuple[int, int]) -> AnnotationError:
    """The error of an image whose file has another width and height than the annotation file says."""
    return AnnotationError(
        f"image {entry.id} must be {entry.width}x{entry.height}, as its annotation file says, got {file}, which is "
        f"{size[0]}x{size[1]}"
    )


def batch(samples: list[Sample]) -> tuple[list[Tensor], Targets]:
    """Images, as a list because their sizes differ, and targets."""
    return [image for image, _ in samples], Targets([target for _, target in samples])
