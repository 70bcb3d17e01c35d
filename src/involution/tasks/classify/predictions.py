"""Writing down what a classifier says about images."""

import csv
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from ...engine.images import read_image

_SHOWN = 20  # images in the table on the screen
_CELL, _LINE = 192, 16  # pixels: a picture's side in the grid, and a line of text under it


Ranking = list[tuple[str, float]]  # the likeliest classes of an image and their probabilities, the likeliest first


class RankingWriter:
    """Writes predictions.csv, and shows the first images' likeliest classes.

    Args:
        folder: where the results go.
        files: the images.
        classes: their names.
        top_k: classes per image; fewer if there are not so many.
        grid: write predictions.png too, so many of the images with their classes.
        grid_columns: images in a row of it.
    """

    def __init__(
        self, folder: Path, files: Sequence[Path], classes: Sequence[str], top_k: int, grid: int, grid_columns: int
    ) -> None:
        self.folder, self.files, self.classes, self.top_k = folder, files, classes, min(top_k, len(classes))
        self.grid, self.grid_columns = grid, grid_columns
        self._rankings: dict[int, Ranking] = {}

    def add(self, index: int, probabilities: Tensor) -> None:
        """Keeps the likeliest classes of files[index]; probabilities are [num_classes]."""
        values, classes = probabilities.float().topk(self.top_k)
        self._rankings[index] = [(self.classes[i], p) for i, p in zip(classes.tolist(), values.tolist(), strict=True)]

    def close(self) -> None:
        """Writes and shows them, in the files' order."""
        kept = sorted(self._rankings)
        files, rows = [self.files[index] for index in kept], [self._rankings[index] for index in kept]
        names = [str(file) for file in files]
        write_csv(self.folder / "predictions.csv", names, rows)
        print_table(names, rows)
        print(f"wrote {self.folder / 'predictions.csv'}")
        if self.grid:
            write_grid(self.folder / "predictions.png", files[: self.grid], rows[: self.grid], self.grid_columns)
            print(f"wrote {self.folder / 'predictions.png'}")


def write_csv(file: Path, names: Sequence[str], rows: Sequence[Ranking]) -> None:
    """Writes a line for every image and rank: image, rank (from 1), class, probability."""
    with file.open("w", newline="", encoding="utf-8", errors="surrogateescape") as stream:
        writer = csv.writer(stream)
        writer.writerow(["image", "rank", "class", "probability"])
        for name, row in zip(names, rows, strict=True):
            for rank, (label, probability) in enumerate(row, start=1):
                writer.writerow([name, rank, label, f"{probability:.4f}"])


def print_table(names: Sequence[str], rows: Sequence[Ranking]) -> None:
    """Shows the first images on the screen."""
    table = Table("image", *(f"top {rank}" for rank in range(1, len(rows[0]) + 1)))
    for name, row in list(zip(names, rows, strict=True))[:_SHOWN]:
        table.add_row(escape(name), *(escape(f"{label} {probability:.1%}") for label, probability in row))
    console = Console()
    console.print(table)
    if len(names) > _SHOWN:
        console.print(f"... and {len(names) - _SHOWN} more")


def write_grid(file: Path, images: Sequence[Path], rows: Sequence[Ranking], columns: int) -> None:
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
