"""Reading image files as they are found in the wild."""

import multiprocessing
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset


class UnreadableImage(ValueError):
    """A file that is no image, or a broken one; the message names it."""


@contextmanager
def unreadable(name: object, kind: str = "an image") -> Iterator[None]:
    """Names the file where PIL cannot decode it."""
    try:
        yield
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UnreadableImage(f"{name} cannot be read as {kind}: {error}") from error


def read_image(source: str | Path | IO[bytes], name: str | None = None) -> Image.Image:
    """One image file as RGB, upright.

    The EXIF orientation is applied; grey, palette, CMYK and 16-bit images are converted (16 bits to the upper 8), a
    transparent one loses its alpha channel.

    Args:
        source: the file, or its content.
        name: what errors call it; None takes the file's.

    Raises:
        UnreadableImage: it is no image, a broken one, or one of numbers that are no grey levels of 8 or 16 bits.
    """
    with unreadable(name or source), Image.open(source) as file:
        file.load()
        image = ImageOps.exif_transpose(file)
    if image.mode == "F" or (image.mode == "I" and not _has_16_bits(np.asarray(image))):
        raise UnreadableImage(f"{name or source} cannot be read as an image: its numbers are no grey levels of 16 bits")
    if image.mode.startswith("I"):  # 16 bits, or 32 that hold 16; PIL would clip them at 255
        image = Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8))
    return image.convert("RGB")


def _has_16_bits(pixels: np.ndarray[Any, Any]) -> bool:
    return bool(0 <= pixels.min() <= pixels.max() < 1 << 16)


class Skipping(Dataset[Any]):
    """In the place of a sample that cannot be read comes the next one that can.

    Args:
        dataset: raises UnreadableImage for such a sample.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        self._broken = multiprocessing.Array("b", len(dataset), lock=False)  # a flag a sample, of all workers

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
        """For every sample, 1 where this process or a worker of it could not read it, else 0: [len(self)] int32."""
        return torch.tensor(list(self._broken), dtype=torch.int32)
