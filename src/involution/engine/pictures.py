"""File names and class colours of the pictures that predictions are drawn in."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

Colour = tuple[int, int, int]  # red, green, blue, 0..255


def picture_names(files: Sequence[Path]) -> list[str]:
    """A unique picture name per file: STEM.png, then STEM_2.png and so on for further files of the same stem."""
    names: dict[str, None] = {}
    for file in files:
        name, number = f"{file.stem}.png", 1
        while name in names:
            number += 1
            name = f"{file.stem}_{number}.png"
        names[name] = None
    return list(names)


def side_by_side(pictures: Sequence[Image.Image], columns: int) -> Image.Image:
    """Pictures in rows of `columns`, each in a cell of the largest one's size, on white."""
    width, height = (max(sides) for sides in zip(*(one.size for one in pictures), strict=True))
    used = min(columns, len(pictures))
    sheet = Image.new("RGB", (used * width, -(-len(pictures) // columns) * height), "white")
    for index, one in enumerate(pictures):
        sheet.paste(one, (index % columns * width, index // columns * height))
    return sheet


def colour(index: int) -> Colour:
    """The colour of a class: hues in golden-ratio steps, so that consecutive classes differ clearly."""
    hue = round(255 * (index * 0.618034 % 1))
    found: Colour = Image.new("HSV", (1, 1), (hue, 200, 200)).convert("RGB").getpixel((0, 0))  # type: ignore[assignment]
    return found
