"""Folders of images and of masks with the same names."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from involution.engine.files import files_below
from involution.engine.images import ENDINGS
from involution.engine.pictures import Colour

from ..preprocessing import IGNORED
from .base import Pair, SegmentationData
from .values import PixelValues, colour_of, pixel_values

MASK_ENDINGS = (".png", ".tif", ".tiff", ".bmp", ".gif")  # lossless formats


class Folders(SegmentationData):
    """Images in one folder, masks in another: root/images/train/a.jpg belongs to root/masks/train/a.png.

    Masks are PNG, TIFF, BMP or GIF files. Their pixels are class indices from 0, or the `values`, or `ignore_index`. Of
    palette images the indices count, unless `values` are colours. Images and masks may share a folder, as a.jpg beside
    a.png or, with a `mask_suffix`, a.png beside a_mask.png.

    Args:
        root: the tree.
        classes: class names, in the order of ids.
        images: the image folder below root, {split} being the part's name.
        masks: the mask folder, likewise.
        mask_suffix: the end of a mask's stem after its image's stem.
        train: name of the training part.
        val: name of the validation part.
        test: name of the test part; None uses `val`.
        values: the value of each class in masks, in the order of `classes`: numbers such as [0, 255], or colours such
            as ["#000000", "#ff8000"] or [[0, 0, 0], [255, 128, 0]]; an alpha channel is ignored. "binary" is for two
            classes: 0 is the first, 1 or 255 the second. None means class indices.
        ignore_index: value of ignored pixels, a number or a colour; None ignores none. It takes precedence over a class
            index, but not over `values`.
        palette: each class's colour in pictures, three numbers of 0..255; None uses those of `values`, or made ones.
        **segmentation: see `SegmentationData`.

    Raises:
        FileNotFoundError: a folder is missing; an image has no mask, or a mask no image.
        ValueError: an argument does not fit; two files differ only in their ending; a mask has another size than its
            image, several channels or an unknown id (when it is read).
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
        values: list[int] | list[tuple[int, int, int]] | list[str] | str | None = None,
        ignore_index: int | tuple[int, int, int] | str | None = IGNORED,
        palette: Sequence[Colour] | None = None,
        **segmentation: Any,
    ) -> None:
        super().__init__(**segmentation)
        self._remedy = "; data.values gives the value of every class, and is binary for masks of 0 and 255"
        if len(classes) == 1:
            raise ValueError(
                f"classes must be two at least, got {classes!r}, which every pixel would be; name the background "
                f"too, as ['background', {classes[0]!r}]"
            )
        if not 2 <= len(classes) <= IGNORED or len(set(classes)) < len(classes):
            raise ValueError(f"classes must be 2 to {IGNORED} different names, got {classes!r}")
        if isinstance(ignore_index, int) and not 0 <= ignore_index < 1 << 16:
            raise ValueError(f"ignore_index must be an id, from 0 to 65535, got {ignore_index!r}")
        self._values = pixel_values(values, len(classes), ignore_index)
        if palette is None and self._values.colours and isinstance(values, list):
            self.palette = [colour_of(value) for value in values]
        if palette is not None:
            if len(palette) != len(classes):
                raise ValueError(f"palette must have a colour for each of {len(classes)} classes, got {len(palette)}")
            if any(len(one) != 3 or not all(0 <= value <= 255 for value in one) for one in palette):
                raise ValueError(f"palette must be of colours, three numbers from 0 to 255, got {palette!r}")
            self.palette = [(one[0], one[1], one[2]) for one in palette]
        self.root, self.classes = Path(root), classes
        self._places, self._suffix = (images, masks), mask_suffix
        self._names = {"train": train, "val": val, "test": test or val}

    @property
    def values(self) -> PixelValues:
        """The table of the options `values` and `ignore_index`."""
        return self._values

    def pairs(self, part: str) -> list[Pair]:
        """The files of "train", "val" or "test", in alphabetical order."""
        folders = [self.root / place.format(split=self._names[part]) for place in self._places]
        for folder in folders:
            if not folder.is_dir():
                raise FileNotFoundError(f"root must hold images and masks of {part}, got {self.root}: no {folder}")
        images, masks = self._images(*folders), _by_name(folders[1], MASK_ENDINGS, self._suffix, folders[0])
        for missing, kind, found in ((masks, "mask", images), (images, "image", masks)):
            for name, file in found.items():
                if name not in missing:
                    where = folders[kind == "mask"]
                    wanted = f"{Path(name).name}{self._suffix}.png, .tif, ..." if kind == "mask" else f"{name}.jpg, ..."
                    raise FileNotFoundError(
                        f"{file} must have its {kind} in {where}, got none of the same name ({wanted})"
                    )
        if not images:
            raise FileNotFoundError(f"root must hold images of {part}, got {self.root}: none in {folders[0]}")
        return [(images[name], masks[name]) for name in sorted(images)]

    def _images(self, folder: Path, masks: Path) -> dict[str, Path]:
        """Images by name; in a folder shared with the masks, suffix or ending distinguish them."""
        if folder.resolve() != masks.resolve():
            return _by_name(folder, ENDINGS, "", masks)
        if not self._suffix:
            return _by_name(folder, [ending for ending in ENDINGS if ending not in MASK_ENDINGS], "")
        found = _by_name(folder, ENDINGS, "")
        return {name: file for name, file in found.items() if not file.stem.endswith(self._suffix)}


def _by_name(folder: Path, endings: Sequence[str], suffix: str, without: Path | None = None) -> dict[str, Path]:
    """Files by path below a folder, without ending and suffix; other files are ignored.

    So are those of the folder `without`, if it is below this one.
    """
    found: dict[str, Path] = {}
    inside = without is not None and without != folder and without.is_relative_to(folder)
    for file in files_below(folder, endings):
        if file.stem.endswith(suffix) and not (inside and file.is_relative_to(without or "")):
            name = str(file.relative_to(folder).with_name(file.stem.removesuffix(suffix)))
            if name in found:
                raise ValueError(f"every name must belong to one file, got {file} beside {found[name]}")
            found[name] = file
    return found
