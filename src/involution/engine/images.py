"""Reading and checking image files of any orientation, mode and bit depth."""

import multiprocessing
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image, ImageOps
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.utils.data import Dataset

# Pillow's names of the formats that are tried; its dozens of others raise errors of further kinds.
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "PPM", "TIFF", "WEBP")
# Of the names that these files have; which format a file is in, its content tells.
ENDINGS = (".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp")


LONGEST = 200  # times as long as wide: resizing the shorter side of a longer image would fill the memory


class UnreadableImage(ValueError):
    """A file that cannot be decoded as an image; the message names it."""


@contextmanager
def unreadable(name: object, kind: str = "an image") -> Iterator[None]:
    """Turns any error of Pillow's decoders into UnreadableImage, which names the file."""
    try:
        yield
    except Exception as error:
        raise UnreadableImage(f"{name} cannot be read as {kind}: {error}") from error


def read_image(source: str | Path | IO[bytes], name: str | None = None, upright: bool = True) -> Image.Image:
    """One image file as RGB, upright.

    The EXIF orientation is applied unless `upright` is false (TIFF's always is, by Pillow). Grey, palette, CMYK and
    16-bit images are converted (16 bits to the upper 8), a transparent one loses its alpha channel.

    Args:
        source: the file, or its content.
        name: its name in errors; None takes the file's.
        upright: apply the EXIF orientation, or keep the pixels as stored.

    Raises:
        UnreadableImage: the source is no image of one of `FORMATS`, is damaged, has more than 179 million pixels
            (Pillow's limit), is more than `LONGEST` times as long as wide, or its values are no grey levels of 8 or 16
            bits.
    """
    with unreadable(name or source), Image.open(source, formats=FORMATS) as file:
        if max(file.size) > LONGEST * min(file.size):
            raise ValueError(f"it must be at most {LONGEST} times as long as wide, got {file.width}x{file.height}")
        file.load()
        image = ImageOps.exif_transpose(file) if upright else file.copy()
    if image.mode == "F" or (image.mode == "I" and not _has_16_bits(np.asarray(image))):
        raise UnreadableImage(f"{name or source} cannot be read as an image: its values are no grey levels of 16 bits")
    if image.mode.startswith("I"):  # 16 bits, or 32 that hold 16; PIL would clip them at 255
        image = Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8))
    return image.convert("RGB")


class Header(NamedTuple):
    """An image file's width and height as stored, and its EXIF orientation, from 1 (upright) to 8."""

    size: tuple[int, int]
    orientation: int

    @property
    def upright_size(self) -> tuple[int, int]:
        """Width and height of the upright image: orientations from 5 on exchange them."""
        width, height = self.size
        return (height, width) if self.orientation >= 5 else (width, height)


_ORIENTATION = 0x0112  # EXIF's tag
_ENDS = {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}


def inspect(file: Path) -> Header:
    """Checks that an image file is complete: by its last bytes where the format has an end marker, else by decoding.

    Raises:
        UnreadableImage: the file is no image, or is truncated.
    """
    with unreadable(file), Image.open(file, formats=FORMATS) as image:
        orientation = 1 if image.format == "TIFF" else image.getexif().get(_ORIENTATION, 1)
        header = Header(image.size, orientation if orientation in range(1, 9) else 1)
        with file.open("rb") as stream:
            stream.seek(max(0, file.stat().st_size - 64))
            end = stream.read()
        if _ENDS.get(image.format or "", end + b" ") not in end:
            image.load()
    return header


Item = TypeVar("Item")
Found = TypeVar("Found")


def for_each(items: Sequence[Item], function: Callable[[Item], Found], what: str) -> list[Found | UnreadableImage]:
    """Calls a function with every item, in several threads, with a progress bar on a terminal.

    Args:
        items: such as files.
        function: of one item; an UnreadableImage that it raises becomes its result, any other error is raised.
        what: the progress bar's text.

    Returns:
        The results, in the order of items.
    """

    def attempt(item: Item) -> Found | UnreadableImage:
        try:
            return function(item)
        except UnreadableImage as error:
            return error

    console = Console(stderr=True)
    with ThreadPoolExecutor(min(32, 2 * cores())) as threads:
        results = threads.map(attempt, items)
        shown = track(results, what, len(items), console=console, transient=True, disable=not sys.stderr.isatty())
        return list(shown)


def cores() -> int:
    """The number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _has_16_bits(pixels: np.ndarray[Any, Any]) -> bool:
    return bool(0 <= pixels.min() <= pixels.max() < 1 << 16)


class SkipUnreadable(Dataset[Any]):
    """Replaces a sample that cannot be read by the next one that can.

    Args:
        dataset: a data set that raises UnreadableImage for such a sample.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        self._broken = multiprocessing.Array(
            "b", len(dataset), lock=False
        )  # one flag per sample, shared by all workers

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        for number in range(len(self)):
            place = (index + number) % len(self)
            try:
                return self.dataset[place]
            except UnreadableImage as error:
                if not self._broken[place]:
                    warnings.warn(f"skipped: {error}", RuntimeWarning, stacklevel=1)
                self._broken[place] = 1
        raise ValueError(f"none of the {len(self)} images can be read")

    @property
    def broken(self) -> Tensor:
        """[len(self)] int32: 1 for each sample that this process or one of its workers could not read, else 0."""
        return torch.tensor(list(self._broken), dtype=torch.int32)
