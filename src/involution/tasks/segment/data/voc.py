"""Pascal VOC and the Oxford pets, as torchvision downloads them."""

from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torchvision import datasets

from ....engine.files import read_lines
from ..preprocessing import IGNORED
from .base import Pair, SegmentationData, existing

_VOC = (
    "background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person "
    "pottedplant sheep sofa train tvmonitor"
)


class VOC(SegmentationData):
    """Pascal VOC's segmentation: 20 kinds of things and the background; tested on its validation images.

    Args:
        root: torchvision's download is in it, or goes there.
        year: "2007" to "2012"; 2012 has 1,464 images to train on and 1,449 to validate on.
        download: let torchvision fetch it if it is not there.
        **segmentation: see `SegmentationData`.

    Raises:
        FileNotFoundError: it is not there, or a file of it.
    """

    classes = tuple(_VOC.split())

    def __init__(self, root: str, year: str = "2012", download: bool = False, **segmentation: Any) -> None:
        super().__init__(**segmentation)
        self.root, self.year, self.download = Path(root), year, download

    def prepare_data(self) -> None:
        """Downloads, if asked to and not there."""
        if self.download and not (self.root / datasets.voc.DATASET_YEAR_DICT[self.year]["base_dir"]).is_dir():
            datasets.VOCSegmentation(self.root, self.year, "train", download=True)

    @cached_property
    def palette(self) -> list[tuple[int, int, int]]:
        """VOC's own: a class's bits, from the lowest, are the highest of red, green and blue in turn."""
        return [
            tuple(sum((index >> (3 * bit + channel) & 1) << (7 - bit) for bit in range(3)) for channel in range(3))  # type: ignore[misc]
            for index in range(self.num_classes)
        ]

    def pairs(self, part: str) -> list[Pair]:
        """The files of "train" or "val"; "test" is "val"."""
        split = "train" if part == "train" else "val"
        try:
            found = datasets.VOCSegmentation(self.root, self.year, split)
        except (RuntimeError, FileNotFoundError) as error:  # torchvision's, for a missing folder or list
            raise FileNotFoundError(f"root must hold Pascal VOC {self.year}, got {self.root}: {error}") from error
        return existing([(Path(image), Path(mask)) for image, mask in zip(found.images, found.masks, strict=True)])


class Pets(SegmentationData):
    """The Oxford-IIIT pets' trimaps: 3,680 images to train and validate on, 3,669 to test on.

    Args:
        root: torchvision's download is in it, or goes there.
        download: let torchvision fetch it (800 MB) if it is not there.
        val_fraction: of the 3,680 images, always the same ones.
        **segmentation: see `SegmentationData`.

    Raises:
        FileNotFoundError: it is not there, or a file of it.
        ValueError: an argument does not fit.
    """

    classes = ("pet", "background", "border")

    def __init__(self, root: str, download: bool = False, val_fraction: float = 0.1, **segmentation: Any) -> None:
        super().__init__(**segmentation)
        if not 0 < val_fraction < 1:
            raise ValueError(f"val_fraction must be between 0 and 1, got {val_fraction!r}")
        self.root, self.download, self.val_fraction = Path(root) / "oxford-iiit-pet", download, val_fraction

    @property
    def ids(self) -> dict[int, int]:
        """A trimap counts from 1."""
        return {1: 0, 2: 1, 3: 2, IGNORED: IGNORED}

    def prepare_data(self) -> None:
        """Downloads, if asked to and not there."""
        if self.download and not self.root.is_dir():
            datasets.OxfordIIITPet(self.root.parent, "trainval", "segmentation", download=True)

    def pairs(self, part: str) -> list[Pair]:
        """The files of "train", "val" or "test"."""
        names = self.root / "annotations" / ("test.txt" if part == "test" else "trainval.txt")
        if not names.is_file():
            raise FileNotFoundError(f"root must hold the Oxford pets, got {self.root.parent}: no {names}")
        found = [line.split()[0] for line in read_lines(names)]
        if part != "test":
            order = torch.randperm(len(found), generator=torch.Generator().manual_seed(0)).tolist()
            held = set(order[: max(1, round(self.val_fraction * len(found)))])
            found = [name for index, name in enumerate(found) if (index in held) == (part == "val")]
        masks = self.root / "annotations" / "trimaps"
        return existing([(self.root / "images" / f"{name}.jpg", masks / f"{name}.png") for name in found])
