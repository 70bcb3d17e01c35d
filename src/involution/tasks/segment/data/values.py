"""The class of a mask's pixel: by class index, other value, or colour."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from involution.engine.pictures import Colour

from ..preprocessing import IGNORED

Value = int | tuple[int, int, int] | str  # of a pixel: a number, or a colour as three numbers or "#ff8000"


class PixelValues(NamedTuple):
    """The class of each value that a mask's pixels may have; `IGNORED` means none.

    Values are those of one channel (grey levels or palette indices) or, if `colours`, 65536 R + 256 G + B.
    """

    classes: Mapping[int, int]
    colours: bool = False

    def apply(self, image: Image.Image, file: object) -> np.ndarray:
        """A mask's classes, [H, W] uint8.

        Args:
            image: the decoded file.
            file: its name in errors.

        Raises:
            ValueError: the image has several channels where values are numbers, or a value that is not in the table.
        """
        pixels = _packed(image.convert("RGB")) if self.colours else _numbers(image, file)
        few = pixels.dtype in (np.uint8, np.uint16)
        found = (np.flatnonzero(np.bincount(pixels.ravel())) if few else np.unique(pixels)).tolist()
        wrong = [value for value in found if value not in self.classes]
        if wrong:
            what = "colours" if self.colours else "ids"
            raise ValueError(
                f"{file} must hold {what} among {self._shown(sorted(self.classes))}, got {self._shown(wrong)}; "
                "data.values gives the value or colour of every class"
            )
        result = np.zeros(pixels.shape, np.uint8)
        for value in found:
            if self.classes[value]:
                result[pixels == value] = self.classes[value]
        return result

    def _shown(self, values: Sequence[int]) -> str:
        shown = [f"#{value:06x}" if self.colours else str(value) for value in values[:40]]
        return ", ".join(shown) + (", ..." if len(values) > 40 else "")


def _packed(image: Image.Image) -> np.ndarray:
    channels = np.asarray(image).astype(np.int32)
    packed: np.ndarray = channels[..., 0] << 16 | channels[..., 1] << 8 | channels[..., 2]
    return packed


def _numbers(image: Image.Image, file: object) -> np.ndarray:
    pixels = np.asarray(image)
    if pixels.ndim != 2:
        raise ValueError(
            f"{file} must have one channel, of ids, got mode {image.mode}; data.values gives the colours of classes"
        )
    return pixels.astype(np.uint8) if pixels.dtype == bool else pixels


def pixel_values(values: Sequence[Value] | str | None, count: int, ignored: Value | None) -> PixelValues:
    """The table for a data set's options.

    Args:
        values: of each class, in order; "binary" for two classes, the first 0, the second 1 or 255; None for class
            indices.
        count: number of classes.
        ignored: the value of ignored pixels, or None. It takes precedence over a class index, but not over `values`.

    Raises:
        ValueError: values do not fit the classes, or each other.
    """
    if values == "binary":
        if count != 2:
            raise ValueError(f"values may be binary for two classes, got {count} classes")
        return PixelValues({0: 0, 1: 1, 255: 1})
    if isinstance(values, str):
        raise ValueError(f"values must be binary, or a list with the value or colour of each class, got {values!r}")
    given = list(range(count)) if values is None else list(values)
    if len(given) != count:
        raise ValueError(f"values must be one for each of {count} classes, got {len(given)}: {given!r}")
    colours = [not isinstance(value, int) for value in given]
    if any(colours) and not all(colours):
        raise ValueError(f"values must all be numbers or all be colours, got {given!r}")
    table = {_number(value): index for index, value in enumerate(given)}
    if len(table) < count:
        raise ValueError(f"values must be different, got {given!r}")
    if ignored is not None and isinstance(ignored, int) != any(colours):
        own = {_number(ignored): IGNORED}
        table = table | own if values is None else own | table
    return PixelValues(table, any(colours))


def colour_of(value: Value) -> Colour:
    """Red, green and blue.

    Raises:
        ValueError: the value is no colour.
    """
    if isinstance(value, str):
        digits = value.removeprefix("#")
        if len(digits) == 6 and all(digit in "0123456789abcdefABCDEF" for digit in digits):
            return int(digits[:2], 16), int(digits[2:4], 16), int(digits[4:], 16)
    elif not isinstance(value, int) and len(value) == 3 and all(0 <= one <= 255 for one in value):
        return value[0], value[1], value[2]
    raise ValueError(f"a colour must be three numbers from 0 to 255 or such as '#ff8000', got {value!r}")


def _number(value: Value) -> int:
    if isinstance(value, int):
        if not 0 <= value < 1 << 16:
            raise ValueError(f"values must be from 0 to 65535, got {value!r}")
        return value
    red, green, blue = colour_of(value)
    return red << 16 | green << 8 | blue
