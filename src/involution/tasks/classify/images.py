"""Reading image files as they are found in the wild."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps


def read_image(path: str | Path) -> Image.Image:
    """One image file as RGB, upright.

    The EXIF orientation is applied; grey, palette, CMYK and 16-bit images are converted (16 bits to the upper 8), a
    transparent one loses its alpha channel.

    Raises:
        ValueError: the file is no image, or a broken one; the message names it.
    """
    try:
        with Image.open(path) as file:
            file.load()
            image = ImageOps.exif_transpose(file)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} cannot be read as an image: {error}") from error
    if image.mode.startswith("I"):  # 16 bits, or 32 that hold 16; PIL would clip them at 255
        image = Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8))
    return image.convert("RGB")
