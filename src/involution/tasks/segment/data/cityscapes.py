"""Cityscapes in the folders of its official download."""

from pathlib import Path
from typing import Any

from torchvision import datasets

from involution.engine.files import is_hidden

from ..preprocessing import IGNORED
from .base import Pair, SegmentationData, existing

_TABLE = datasets.Cityscapes.classes
_TRAINED = sorted((entry for entry in _TABLE if not entry.ignore_in_eval), key=lambda entry: entry.train_id)


class Cityscapes(SegmentationData):
    """Cityscapes, fine annotations: 2,975 images to train on, 500 to validate and test on, 19 classes.

    root/leftImg8bit/{train,val}/CITY/*_leftImg8bit.png and root/gtFine/{train,val}/CITY/*_gtFine_labelIds.png, as
    unpacked. The official test images have no public labels.

    Args:
        root: the tree.
        resize: pixels of an image's shorter side, in training before `scale`; 1024 is the original size.
        crop: height and width of a training image, in pixels; one number means a square.
        **segmentation: see `SegmentationData`.

    Raises:
        FileNotFoundError: a folder or an image's mask is missing.
    """

    classes = tuple(entry.name for entry in _TRAINED)

    def __init__(
        self, root: str, resize: int = 1024, crop: tuple[int, int] | int = (512, 1024), **segmentation: Any
    ) -> None:
        super().__init__(resize=resize, crop=crop, **segmentation)
        self.root = Path(root)

        self.palette = [entry.color for entry in _TRAINED]

    @property
    def ids(self) -> dict[int, int]:
        """The official ids; those outside the evaluation are ignored."""
        trained = {entry.id: entry.train_id for entry in _TRAINED}
        return {entry.id: trained.get(entry.id, IGNORED) for entry in _TABLE if entry.id >= 0} | {IGNORED: IGNORED}

    def pairs(self, part: str) -> list[Pair]:
        """The files of "train" or "val"; "test" is "val"."""
        split = "train" if part == "train" else "val"
        images, masks = (self.root / folder / split for folder in ("leftImg8bit", "gtFine"))
        if not images.is_dir():
            raise FileNotFoundError(f"root must hold Cityscapes' folders, got {self.root}: no {images}")
        found = []
        for image in _visible(images, "*/*_leftImg8bit.png"):
            name = image.name.removesuffix("_leftImg8bit.png")
            found.append((image, masks / image.parent.name / f"{name}_gtFine_labelIds.png"))
        if not found:
            raise FileNotFoundError(f"root must hold images in {images}/CITY, got none")
        alone = sorted(set(_visible(masks, "*/*_gtFine_labelIds.png")) - {mask for _, mask in found})
        if alone:
            raise FileNotFoundError(f"every mask must have an image, got {alone[0]} without one in {images}")
        return existing(found)


def _visible(folder: Path, pattern: str) -> list[Path]:
    """Matching files, sorted; hidden ones are skipped."""
    return sorted(file for file in folder.glob(pattern) if not is_hidden(file.relative_to(folder)))
