"""Writing down what a classifier says about images."""

import csv
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from ..images import read_image

_SHOWN = 20  # images in the table on the screen
_CELL, _LINE = 192, 16  # pixels: a picture's side in the grid, and a line of text under it


def ranked(probabilities: Tensor, classes: Sequence[str], top_k: int) -> list[list[tuple[str, float]]]:
    """For every image the `top_k` likeliest classes (fewer if there are not so many) and their probabilities."""
    values, indices = probabilities.topk(min(top_k, len(classes)), dim=1)
    pairs = zip(indices.tolist(), values.tolist(), strict=True)
    return [[(classes[i], p) for i, p in zip(*pair, strict=True)] for pair in pairs]


def write_csv(file: Path, names: Sequence[str], rows: Sequence[Sequence[tuple[str, float]]]) -> None:
    """Writes a line for every image and rank: image, rank (from 1), class, probability."""
    with file.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["image", "rank", "class", "probability"])
        for name, row in zip(names, rows, strict=True):
            for rank, (label, probability) in enumerate(row, start=1):
                writer.writerow([name, rank, label, f"{probability:.4f}"])


def print_table(names: Sequence[str], rows: Sequence[Sequence[tuple[str, float]]]) -> None:
    """Shows the first images on the screen."""
    table = Table("image", *(f"top {rank}" for rank in range(1, len(rows[0]) + 1)))
    for name, row in list(zip(names, rows, strict=True))[:_SHOWN]:
        table.add_row(escape(name), *(escape(f"{label} {probability:.1%}") for label, probability in row))
    console = Console()
    console.print(table)
    if len(names) > _SHOWN:
        console.print(f"... and {len(names) - _SHOWN} more")


def write_grid(file: Path, images: Sequence[Path], rows: Sequence[Sequence[tuple[str, float]]], columns: int) -> None:
    """Writes a picture of all images in a grid, the likeliest classes under each."""
    lines = len(rows[0])
    height = _CELL + _LINE * lines + 4
    used = min(columns, len(images))
    sheet = Image.new("RGB", (used * _CELL, -(-len(images) // columns) * height), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(_LINE - 4)
    for index, (path, row) in enumerate(zip(images, rows, strict=True)):
        left, top = index % columns * _CELL, index // columns * height
        image = ImageOps.contain(read_image(path), (_CELL - 4, _CELL - 4))
        sheet.paste(image, (left + (_CELL - image.width) // 2, top + (_CELL - image.height) // 2))
        for line, (label, probability) in enumerate(row):
            text = f"{probability:.0%} {label}"
            draw.text((left + 4, top + _CELL + _LINE * line), text, fill="black", font=font)
    sheet.save(file)
