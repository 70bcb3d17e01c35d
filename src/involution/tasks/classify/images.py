"""Reading image files as they are found in the wild."""

import multiprocessing
import warnings
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image, ImageOps
from torch.utils.data import Dataset


def read_image(source: str | Path | IO[bytes], name: str | None = None) -> Image.Image:
    """One image file as RGB, upright.

    The EXIF orientation is applied; grey, palette, CMYK and 16-bit images are converted (16 bits to the upper 8), a
    transparent one loses its alpha channel.

    Args:
        source: the file, or its content.
        name: what errors call it; None takes the file's.

    Raises:
        ValueError: it is no image, or a broken one.
    """
    try:
        with Image.open(source) as file:
            file.load()
            image = ImageOps.exif_transpose(file)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{name or source} cannot be read as an image: {error}") from error
    if image.mode.startswith("I"):  # 16 bits, or 32 that hold 16; PIL would clip them at 255
        image = Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8))
    return image.convert("RGB")


class Skipping(Dataset[Any]):
    """In the place of a sample that cannot be read comes the next one that can; `skipped` counts, in all processes.

    Args:
        dataset: raises ValueError for such a sample.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        self.skipped = multiprocessing.Value("l", 0)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        for number in range(len(self)):
            try:
                return self.dataset[(index + number) % len(self)]
            except ValueError as error:
                with self.skipped.get_lock():
                    self.skipped.value += 1
                warnings.warn(f"skipped: {error}", RuntimeWarning, stacklevel=1)
        raise ValueError(f"none of the {len(self)} images can be read")
