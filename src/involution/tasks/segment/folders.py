"""Folders of images and of masks with the same names, and CamVid, which is kept so."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torchvision.datasets.folder import IMG_EXTENSIONS

from ..pictures import Colour
from .data import Pair, SegmentationData
from .preprocessing import IGNORED


class Folders(SegmentationData):
    """Images in one folder, masks in another: root/images/train/a.jpg belongs to root/masks/train/a.png.

    Masks are PNG files of one channel (grey or palette) whose pixels are class indices from 0 on, or `ignore_index`.

    Args:
        root: the tree.
        classes: their names, in the order of ids.
        images: the image folder below root, {split} being the part's name.
        masks: the mask folder, likewise.
        mask_suffix: what a mask's stem has after its image's.
        train: name of the part to train on.
        val: of the part to validate on.
        test: of the part to test on; None takes that of `val`.
        ignore_index: id of pixels that are ignored.
        palette: every class's colour, three numbers of 0..255; None makes some.
        **segmentation: see `SegmentationData`.

    Raises:
        FileNotFoundError: a folder is missing; an image has no mask, or a mask no image.
        ValueError: an argument does not fit; two files have one name and differ in its ending alone; a mask has another
            size, several channels or an id of no class (when it is needed).
    """

    def __init__(
        self,
        root: str,
        classes: list[str],
        images: str = "images/{split}",
        masks: str = "masks/{split}",
        mask_suffix: str = "",
        train: str = "train",
        val: str = "val",
        test: str | None = None,
        ignore_index: int = IGNORED,
        palette: Sequence[Colour] | None = None,
        **segmentation: Any,
    ) -> None:
        super().__init__(**segmentation)
        if not 1 <= len(classes) <= IGNORED or len(set(classes)) < len(classes):
            raise ValueError(f"classes must be 1 to {IGNORED} different names, got {classes!r}")
        if not 0 <= ignore_index < 1 << 16:
            raise ValueError(f"ignore_index must be an id, from 0 to 65535, got {ignore_index!r}")
        if palette is not None:
            if len(palette) != len(classes):
                raise ValueError(f"palette must have a colour for each of {len(classes)} classes, got {len(palette)}")
            if any(len(one) != 3 or not all(0 <= value <= 255 for value in one) for one in palette):
                raise ValueError(f"palette must be of colours, three numbers from 0 to 255, got {palette!r}")
            self.palette = [(one[0], one[1], one[2]) for one in palette]
        self.root, self.classes = Path(root), classes
        self._places, self._suffix, self._ignored = (images, masks), mask_suffix, ignore_index
        self._names = {"train": train, "val": val, "test": test or val}

    @property
    def ids(self) -> dict[int, int]:
        """Class indices, and `ignore_index`, which may be one of them."""
        return {**{index: index for index in range(self.num_classes)}, self._ignored: IGNORED}

    def pairs(self, part: str) -> list[Pair]:
        """The files of "train", "val" or "test", in alphabetical order."""
        folders = [self.root / place.format(split=self._names[part]) for place in self._places]
        for folder in folders:
            if not folder.is_dir():
                raise FileNotFoundError(f"root must hold images and masks of {part}, got {self.root}: no {folder}")
        images = _by_name(folders[0], IMG_EXTENSIONS, "")
        masks = _by_name(folders[1], (".png",), self._suffix)
        for missing, kind, found in ((masks, "mask", images), (images, "image", masks)):
            for name, file in found.items():
                if name not in missing:
                    where = folders[kind == "mask"]
                    raise FileNotFoundError(f"{file} must have its {kind} in {where}, got none of the same name")
        if not images:
            raise FileNotFoundError(f"root must hold images of {part}, got {self.root}: none in {folders[0]}")
        return [(images[name], masks[name]) for name in sorted(images)]


def _by_name(folder: Path, endings: Sequence[str], suffix: str) -> dict[str, Path]:
    """Files by their place below the folder, without ending and suffix; others are left out."""
    found: dict[str, Path] = {}
    for file in folder.rglob("*"):
        if file.suffix.lower() in endings and file.stem.endswith(suffix) and not file.name.startswith("."):
            name = str(file.relative_to(folder).with_name(file.stem.removesuffix(suffix)))
            if name in found:
                raise ValueError(f"every name must be one file's, got {file} beside {found[name]}")
            found[name] = file
    return found


class CamVid(Folders):
    """CamVid as SegNet's authors keep it: 367, 101 and 233 road scenes of 480x360, eleven classes.

    root/{train,val,test}/images and root/{train,val,test}/labels; id 11 (unlabelled) is ignored.

    Args:
        root: the tree.
        **segmentation: see `SegmentationData`.
    """

    def __init__(self, root: str, resize: int = 360, crop: tuple[int, int] = (360, 480), **segmentation: Any) -> None:
        super().__init__(
            root,
            list(_CAMVID),
            images="{split}/images",
            masks="{split}/labels",
            test="test",
            ignore_index=len(_CAMVID),
            palette=list(_CAMVID.values()),
            resize=resize,
            crop=crop,
            **segmentation,
        )


_CAMVID = {
    "Sky": (128, 128, 128),
    "Building": (128, 0, 0),
    "Pole": (192, 192, 128),
    "Road": (128, 64, 128),
    "Pavement": (60, 40, 222),
    "Tree": (128, 128, 0),
    "SignSymbol": (192, 128, 128),
    "Fence": (64, 64, 128),
    "Car": (64, 0, 128),
    "Pedestrian": (64, 64, 0),
    "Bicyclist": (0, 128, 192),
}
