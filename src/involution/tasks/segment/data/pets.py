"""The Oxford-IIIT pets' trimaps, as torchvision downloads them."""

from pathlib import Path
from typing import Any

import torch
from torchvision import datasets

from involution.engine.files import read_lines

from ..preprocessing import IGNORED
from .base import Pair, SegmentationData, existing


class Pets(SegmentationData):
    """The Oxford-IIIT pets' trimaps: 3,680 images for training and validation, 3,669 for testing.

    Args:
        root: folder of torchvision's download.
        download: download the data (800 MB) there if they are missing.
        val_fraction: of the 3,680 images, with a fixed seed.
        **segmentation: see `SegmentationData`.

    Raises:
        FileNotFoundError: root does not hold the data, or a file is missing.
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
        """The classes of a trimap's values, which start at 1."""
        return {1: 0, 2: 1, 3: 2, IGNORED: IGNORED}

    def prepare_data(self) -> None:
        """Downloads the data if `download` is set and they are missing."""
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
