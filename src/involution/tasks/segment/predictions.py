"""Writing a segmenter's predictions: class indices, and pictures with the classes' colours."""

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image

from ...engine.pictures import Colour, picture_names
from ...engine.writer import PredictionWriter


class MaskWriter(PredictionWriter):
    """Writes per image STEM.png, the image with its classes' colours and a legend, and ids/STEM.png, class indices.

    Args:
        folder: the folder for the results.
        files: the images.
        classes: the class names.
        palette: the classes' colours.
        alpha: opacity of the colours.

    Raises:
        ValueError: alpha is not in 0..1.
    """

    def __init__(
        self, folder: Path, files: Sequence[Path], classes: Sequence[str], palette: Sequence[Colour], alpha: float
    ) -> None:
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha must be in 0..1, got {alpha!r}")
        super().__init__(folder, files)
        self.names = picture_names(files)
        self.classes, self.palette, self.alpha = classes, palette, alpha
        self.written = 0

    def add(self, index: int, output: Tensor, pixels: Tensor | None) -> None:
        """Writes both pictures of files[index]; `output` is its mask, [H, W] uint8."""
        assert pixels is not None  # `pictures` is all files
        (self.folder / "ids").mkdir(exist_ok=True)
        overlay(pixels, output, self.classes, self.palette, self.alpha).save(self.folder / self.names[index])
        Image.fromarray(output.numpy()).save(self.folder / "ids" / self.names[index])
        self.written += 1

    def close(self) -> None:
        """Prints the number of pictures."""
        print(f"wrote {self.written} pictures to {self.folder}, and class indices to {self.folder / 'ids'}")


def overlay(
    pixels: Tensor, mask: Tensor, classes: Sequence[str], palette: Sequence[Colour], alpha: float
) -> Image.Image:
    """An image [3, H, W] blended with the colours of a mask [H, W], above a legend of the classes that occur."""
    colours = torch.tensor(palette, dtype=torch.float32)[mask.long()].permute(2, 0, 1)
    mixed = to_pil_image(torch.lerp(pixels.float(), colours, alpha).round().byte())
    return with_legend(mixed, mask.unique().tolist(), classes, palette)


def with_legend(
    image: Image.Image, shown: Sequence[int], classes: Sequence[str], palette: Sequence[Colour]
) -> Image.Image:
    """An image above a legend of the classes shown."""
    below = legend(shown, classes, palette, image.width)
    picture = Image.new("RGB", (image.width, image.height + below.height))
    picture.paste(image, (0, 0))
    picture.paste(below, (0, image.height))
    return picture


def legend(shown: Sequence[int], classes: Sequence[str], palette: Sequence[Colour], width: int) -> Image.Image:
    """A coloured square and a name per class shown, wrapped to the width."""
    size = 14
    font = ImageFont.load_default(size=size - 2)
    places, x, y = [], 4, 4
    for index in shown:
        needed = size + 4 + round(font.getlength(classes[index])) + 12
        if x > 4 and x + needed > width:
            x, y = 4, y + size + 4
        places.append((index, x, y))
        x += needed
    picture = Image.new("RGB", (width, y + size + 4), "white")
    draw = ImageDraw.Draw(picture)
    for index, left, top in places:
        draw.rectangle((left, top, left + size - 1, top + size - 1), fill=palette[index], outline="black")
        draw.text((left + size + 4, top), classes[index], fill="black", font=font)
    return picture
