"""Drawing and writing down the classes of an image's pixels."""

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image

from ..images import read_image
from ..pictures import Colour, picture_names


def write_masks(
    folder: Path,
    files: Sequence[Path],
    masks: Sequence[Tensor],
    classes: Sequence[str],
    palette: Sequence[Colour],
    alpha: float,
) -> None:
    """Writes of every image STEM.png, its classes' colours over it and a legend, and ids/STEM.png, class indices.

    Args:
        folder: where they go.
        files: the images.
        masks: of every image, [H, W] uint8.
        classes: their names.
        palette: their colours.
        alpha: opacity of the colours.
    """
    (folder / "ids").mkdir(exist_ok=True)
    for name, file, mask in zip(picture_names(files), files, masks, strict=True):
        overlay(read_image(file), mask, classes, palette, alpha).save(folder / name)
        Image.fromarray(mask.numpy()).save(folder / "ids" / name)


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
