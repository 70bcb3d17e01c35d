"""Quick drawings of an exploration for the web page: the image with footprints, and all kernels at a pixel."""

from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .explore import Exploration, Layer, Pixel
from .view import Box, View

PREVIEW = 640  # longer side, in pixels, of the image
CELL, GAP, COLUMNS = 72, 4, 8  # pixels of a kernel and between kernels; kernels in a line
THUMBNAIL = 2 * CELL + GAP  # a layer's picture of the image
LINE = 20  # height of a line of text
RED, BLUE = np.array([178, 24, 43]), np.array([33, 102, 172])  # of positive and negative weights
Pixels = np.ndarray[Any, Any]


def draw_preview(explored: Exploration, pixel: Pixel) -> Image.Image:
    """The prediction's picture, at most `PREVIEW` pixels long, with the footprints of all layers at a pixel."""
    picture = explored.prediction.picture.convert("RGB")
    picture.thumbnail((PREVIEW, PREVIEW))
    scale = picture.width / explored.image.width
    if max(picture.size) < PREVIEW:  # small images are enlarged, so that a finger meets a pixel
        width, height = (round(PREVIEW * side / max(picture.size)) for side in picture.size)
        picture = picture.resize((width, height), Image.Resampling.NEAREST)
        scale = picture.width / explored.image.width
    draw = ImageDraw.Draw(picture)
    for box in dict.fromkeys(layer.footprint(explored.view, pixel) for layer in explored.layers):
        draw.rectangle([scale * side for side in box], outline=(255, 160, 0))
    x, y = (scale * (side + 0.5) for side in pixel)
    draw.line((x - 8, y, x + 8, y), fill="red", width=2)
    draw.line((x, y - 8, x, y + 8), fill="red", width=2)
    return picture


def clicked(explored: Exploration, x: float, y: float) -> Pixel:
    """The image's pixel under a point of `draw_preview`."""
    scale = max(explored.image.size) / PREVIEW
    width, height = explored.image.size
    return min(max(0, int(x * scale)), width - 1), min(max(0, int(y * scale)), height - 1)


def draw_mosaic(explored: Exploration, pixel: Pixel, other: Exploration | None = None) -> Image.Image:
    """All kernels at a pixel: per layer the footprint on the image, then a kernel per group over that part of it.

    Red is positive, blue negative; colours follow the square root of weight / largest weight of the kernel, because the
    centre's weight is often ten times the others'.

    Args:
        explored: the network's.
        pixel: of the image.
        other: the convolutional counterpart's, whose layers follow those of the same name.
    """
    beside = {layer.name: layer for layer in other.layers} if other else {}
    grey, small = explored.image.convert("L"), explored.image.copy()
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    rows = [_title(f"{explored.title}, kernels at x {pixel[0]} y {pixel[1]}")]
    for layer in explored.layers:
        rows.append(_row(explored.view, layer, pixel, grey, small))
        if other and layer.name in beside:
            rows.append(_row(other.view, beside.pop(layer.name), pixel, grey, small))
    sheet = Image.new("RGB", (rows[0].width, sum(row.height for row in rows)), "white")
    top = 0
    for row in rows:
        sheet.paste(row, (0, top))
        top += row.height
    return sheet


def _title(text: str) -> Image.Image:
    row = Image.new("RGB", (THUMBNAIL + COLUMNS * (CELL + GAP), LINE + 2 * GAP), "white")
    ImageDraw.Draw(row).text((0, 2), text, fill="black", font=ImageFont.load_default(size=14))
    return row


def _row(view: View, layer: Layer, pixel: Pixel, grey: Image.Image, small: Image.Image) -> Image.Image:
    """A layer's title, footprint and kernels, from the grey image and a small one."""
    kernels = layer.at(view, pixel)
    lines = -(-len(kernels) // COLUMNS)
    row = Image.new(
        "RGB", (THUMBNAIL + COLUMNS * (CELL + GAP), LINE + max(small.height, lines * (CELL + GAP)) + 2 * GAP), "white"
    )
    if layer.kernels.dim() == 3:
        facts = f"{len(kernels)} strongest filters"
    else:
        column, line = layer.position(view, pixel)
        facts = f"{len(kernels)} group{'s' if len(kernels) > 1 else ''}, position {column},{line}"
    text = f"{layer.title}, {facts}"
    ImageDraw.Draw(row).text((0, 2), text, fill="black", font=ImageFont.load_default(size=14))
    box, scale = layer.footprint(view, pixel), small.width / grey.width
    whole = small.copy()
    ImageDraw.Draw(whole).rectangle([scale * side for side in box], outline=(255, 160, 0), width=2)
    row.paste(whole, (0, LINE))
    for index, cell in enumerate(draw_cells(grey, box, kernels)):
        left, top = THUMBNAIL + GAP + index % COLUMNS * (CELL + GAP), LINE + index // COLUMNS * (CELL + GAP)
        row.paste(Image.fromarray(cell), (left, top))
    return row


def draw_cells(grey: Image.Image, box: Box, kernels: Tensor) -> Pixels:
    """Kernels [G, Kh, Kw] over a box of a grey image: [G, CELL, CELL, 3] uint8. Outside of the image it is black."""
    under = grey.transform((CELL, CELL), Image.Transform.EXTENT, box, Image.Resampling.BILINEAR)
    weights = kernels.float().numpy()
    largest = np.abs(weights).max((1, 2), keepdims=True).clip(1e-12)
    strength = np.sqrt(np.abs(weights) / largest)[..., None]
    colours = 255 + strength * (np.where(weights[..., None] > 0, RED, BLUE) - 255)
    opacity = 0.4 + 0.5 * strength
    colours, opacity = _enlarged(colours), _enlarged(opacity)
    pixels = np.asarray(under, dtype=np.float32)[..., None]
    found: Pixels = (pixels + opacity * (colours - pixels)).round().astype(np.uint8)
    return found


def _enlarged(values: Pixels) -> Pixels:
    """[G, Kh, Kw, C] -> [G, CELL, CELL, C], each weight a rectangle."""
    rows, columns = (np.arange(CELL) * size // CELL for size in values.shape[1:3])
    return values[:, rows][:, :, columns]
