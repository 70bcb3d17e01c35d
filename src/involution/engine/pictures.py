"""What the pictures of every task share: names and colours."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

Colour = tuple[int, int, int]  # red, green, blue, 0..255


def picture_names(files: Sequence[Path]) -> list[str]:
    """A name for every file's picture: STEM.png, and STEM_2.png and so on where a stem comes again."""
    names: dict[str, None] = {}
    for file in files:
        name, number = f"{file.stem}.png", 1
        while name in names:
            number += 1
            name = f"{file.stem}_{number}.png"
        names[name] = None
    return list(names)


def colour(index: int) -> Colour:
    """Of a class: far from its neighbours', by hues in the golden ratio."""
    hue = round(255 * (index * 0.618034 % 1))
    found: Colour = Image.new("HSV", (1, 1), (hue, 200, 200)).convert("RGB").getpixel((0, 0))  # type: ignore[assignment]
    return found
