"""Drawing and writing down the classes of an image's pixels."""

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image

from ...engine.images import read_image
from ...engine.pictures import Colour, picture_names


class MaskWriter:
    """Writes of every image STEM.png, its classes' colours over it and a legend, and ids/STEM.png, class indices.

    Args:
        folder: where they go.
        files: the images.
        classes: their names.
        palette: their colours.
        alpha: opacity of the colours.

    Raises:
        ValueError: alpha is not in 0..1.
    """

    def __init__(
        self, folder: Path, files: Sequence[Path], classes: Sequence[str], palette: Sequence[Colour], alpha: float
    ) -> None:
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha must be in 0..1, got {alpha!r}")
        self.folder, self.files, self.names = folder, files, picture_names(files)
        self.classes, self.palette, self.alpha = classes, palette, alpha
        self.written = 0

    def add(self, index: int, mask: Tensor) -> None:
        """Writes both pictures of files[index]; the mask is [H, W] uint8."""
        (self.folder / "ids").mkdir(exist_ok=True)
        picture = overlay(read_image(self.files[index]), mask, self.classes, self.palette, self.alpha)
        picture.save(self.folder / self.names[index])
        Image.fromarray(mask.numpy()).save(self.folder / "ids" / self.names[index])
        self.written += 1

    def close(self) -> None:
        """Says how many there are."""
        print(f"wrote {self.written} pictures to {self.folder}, and class indices to {self.folder / 'ids'}")


def overlay(
    image: Image.Image, mask: Tensor, classes: Sequence[str], palette: Sequence[Colour], alpha: float
) -> Image.Image:
    """An image with the colours of a mask [H, W] over it, and below it a legend of the classes that occur."""
    colours = torch.tensor(palette, dtype=torch.float32)[mask.long()].permute(2, 0, 1)
    mixed = to_pil_image(torch.lerp(pil_to_tensor(image).float(), colours, alpha).round().byte())
    return with_legend(mixed, mask.unique().tolist(), classes, palette)


def with_legend(
    image: Image.Image, shown: Sequence[int], classes: Sequence[str], palette: Sequence[Colour]
) -> Image.Image:
    """An image, and below it a legend of the classes shown."""
    below = legend(shown, classes, palette, image.width)
    picture = Image.new("RGB", (image.width, image.height + below.height))
    picture.paste(image, (0, 0))
    picture.paste(below, (0, image.height))
    return picture


def legend(shown: Sequence[int], classes: Sequence[str], palette: Sequence[Colour], width: int) -> Image.Image:
    """A square of colour and a name for every class shown, in as many lines as they need."""
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
