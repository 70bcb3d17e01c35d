"""ImageNet and Imagenette in torchvision's folders."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from torchvision import datasets
from torchvision.datasets import imagenet

from .image_folder import ImageFolder

_IMAGENETTE = {"full": "imagenette2", "320px": "imagenette2-320", "160px": "imagenette2-160"}


class _WordNetFolders(ImageFolder):
    """Class folders whose names are WNIDs. torchvision's data sets would take hidden folders for classes."""

    def _names(self, known: Mapping[str, Sequence[str]]) -> list[list[str]]:
        """The English names of every folder of root/train, given those of all WNIDs."""
        found = self._class_folders("train")
        unknown = [wnid for wnid in found if wnid not in known]
        if unknown:
            raise ValueError(f"root must hold a folder per WNID, got {self._folder('train') / unknown[0]}")
        return [list(known[wnid]) for wnid in found]


class ImageNet(_WordNetFolders):
    """ImageNet-1k (ILSVRC 2012) in the folders of torchvision's `datasets.ImageNet`; tested on its validation images.

    `root` holds the archives that the ImageNet site offers after registration, including ILSVRC2012_devkit_t12.tar.gz;
    they are unpacked once, to root/{train,val}/WNID. Class names are English. For a tree without the devkit use
    `ImageFolder`.

    Args:
        root: folder of the archives, or of the unpacked images.
        check_files: see `ImageFolder`; off, because torchvision compares the archives' checksums.
        **photographs: see `Photographs`.

    Raises:
        FileNotFoundError: root holds neither archives nor folders.
    """

    def __init__(self, root: str, check_files: bool = False, **photographs: Any) -> None:
        super().__init__(root, check_files, **photographs)

    def prepare_data(self) -> None:
        """Unpacks the archives unless that has been done."""
        steps = {
            imagenet.META_FILE: imagenet.parse_devkit_archive,
            "train": imagenet.parse_train_archive,
            "val": imagenet.parse_val_archive,
        }
        for name, unpack in steps.items():
            try:
                if not (self.root / name).exists():
                    unpack(self.root)
            except RuntimeError as error:  # torchvision's, for an archive that is missing or broken
                raise FileNotFoundError(f"root must hold ImageNet's archives, got {self.root}: {error}") from error

    num_classes = 1000  # known before the archives are unpacked, which one process does

    @cached_property
    def classes(self) -> list[str]:  # type: ignore[override]
        """Every class's first English name, in the order of WNIDs."""
        known, _ = imagenet.load_meta_file(self.root)
        names = [names[0] for names in self._names(known)]  # two names occur twice
        pairs = zip(names, self._class_folders("train"), strict=True)
        return [f"{name} ({wnid})" if names.count(name) > 1 else name for name, wnid in pairs]

    def _folder(self, split: str) -> Path:
        return self.root / ("train" if split == "train" else "val")


class Imagenette(_WordNetFolders):
    """Imagenette: ten easily distinguished classes of ImageNet; tested on its validation images.

    Args:
        root: folder of torchvision's download.
        download: download it there if it is missing (1.5 GB at full size, 100 MB at 160px).
        size: "full", "320px" or "160px", of the shorter side.
        **photographs: see `Photographs`.

    Raises:
        FileNotFoundError: root does not hold it.
        ValueError: size is none of the three.
    """

    def __init__(
        self,
        root: str,
        download: bool = False,
        size: str = "full",
        **photographs: Any,
    ) -> None:
        if size not in _IMAGENETTE:
            raise ValueError(f"size must be one of {', '.join(_IMAGENETTE)}, got {size!r}")
        super().__init__(root, **photographs)
        self.download, self.size = download, size

    num_classes = 10  # known before the download, which one process does

    def prepare_data(self) -> None:
        """Downloads the data if `download` is set and they are missing."""
        if self.download and not self._folder("train").is_dir():
            datasets.Imagenette(self.root, "train", self.size, download=True)

    @cached_property
    def classes(self) -> list[str]:  # type: ignore[override]
        """Every class's first English name, in the order of WNIDs."""
        return [names[0] for names in self._names(datasets.Imagenette._WNID_TO_CLASS)]

    def _folder(self, split: str) -> Path:
        return self.root / _IMAGENETTE[self.size] / ("train" if split == "train" else "val")
