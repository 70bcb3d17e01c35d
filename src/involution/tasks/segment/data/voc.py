"""Pascal VOC's segmentation, as torchvision downloads it."""

from functools import cached_property
from pathlib import Path
from typing import Any

from torchvision import datasets

from .base import Pair, SegmentationData, existing

_VOC = (
    "background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person "
    "pottedplant sheep sofa train tvmonitor"
)


class VOC(SegmentationData):
    """Pascal VOC's segmentation: 20 object classes and the background; tested on its validation images.

    Args:
        root: folder of torchvision's download.
        year: "2007" to "2012"; 2012 has 1,464 training and 1,449 validation images.
        download: download the data there if they are missing.
        **segmentation: see `SegmentationData`.

    Raises:
        FileNotFoundError: root does not hold the data, or a file is missing.
    """

    classes = tuple(_VOC.split())

    def __init__(self, root: str, year: str = "2012", download: bool = False, **segmentation: Any) -> None:
        super().__init__(**segmentation)
        self.root, self.year, self.download = Path(root), year, download

    def prepare_data(self) -> None:
        """Downloads the data if `download` is set and they are missing."""
        if self.download and not (self.root / datasets.voc.DATASET_YEAR_DICT[self.year]["base_dir"]).is_dir():
            datasets.VOCSegmentation(self.root, self.year, "train", download=True)

    @cached_property
    def palette(self) -> list[tuple[int, int, int]]:
        """VOC's palette: a class's bits, lowest first, are interleaved into red, green and blue, highest first."""
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
