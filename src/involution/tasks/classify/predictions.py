"""Writing a classifier's predictions: a CSV file, a table on the screen, a grid of pictures."""

import csv
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image

from ...engine.writer import PredictionWriter

_SHOWN = 20  # images in the table on the screen
_CELL, _LINE = 192, 16  # pixels: a picture's side in the grid, and a line of text under it


Ranking = list[tuple[str, float]]  # the most probable classes of an image with their probabilities, in falling order


class RankingWriter(PredictionWriter):
    """Writes predictions.csv, and shows the most probable classes of the first images.

    Args:
        folder: the folder for the results.
        files: the images.
        classes: the class names.
        top_k: classes per image, at most all of them.
        grid: images in predictions.png; 0 writes none.
        grid_columns: images in a row of it.
    """

    def __init__(
        self, folder: Path, files: Sequence[Path], classes: Sequence[str], top_k: int, grid: int, grid_columns: int
    ) -> None:
        super().__init__(folder, files)
        self.classes, self.top_k = classes, min(top_k, len(classes))
        self.pictures, self.grid_columns = grid, grid_columns
        self._rankings: dict[int, Ranking] = {}
        self._cells: dict[int, Image.Image] = {}

    def add(self, index: int, output: Tensor, pixels: Tensor | None) -> None:
        """Keeps the most probable classes of files[index]; `output` is probabilities [num_classes]."""
        values, classes = output.float().topk(self.top_k)
        self._rankings[index] = [(self.classes[i], p) for i, p in zip(classes.tolist(), values.tolist(), strict=True)]
        if pixels is not None:
            self._cells[index] = cell(pixels)

    def close(self) -> None:
        """Writes and shows the rankings, in the files' order."""
        kept = sorted(self._rankings)
        names, rows = [str(self.files[index]) for index in kept], [self._rankings[index] for index in kept]
        write_csv(self.folder / "predictions.csv", names, rows)
        print_table(names, rows)
        print(f"wrote {self.folder / 'predictions.csv'}")
        if self._cells:
            cells = [(self._cells[index], self._rankings[index]) for index in sorted(self._cells)]
            draw_grid(cells, self.grid_columns).save(self.folder / "predictions.png")
            print(f"wrote {self.folder / 'predictions.png'}")


def write_csv(file: Path, names: Sequence[str], rows: Sequence[Ranking]) -> None:
    """Writes one line per image and rank: image, rank (from 1), class, probability."""
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


def draw_grid(cells: Sequence[tuple[Image.Image, Ranking]], columns: int) -> Image.Image:
    """A grid of small images, with the most probable classes below each."""
    lines = len(cells[0][1])
    height = _CELL + _LINE * lines + 4
    used = min(columns, len(cells))
    sheet = Image.new("RGB", (used * _CELL, -(-len(cells) // columns) * height), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(_LINE - 4)
    for index, (image, row) in enumerate(cells):
        left, top = index % columns * _CELL, index // columns * height
        sheet.paste(image, (left + (_CELL - image.width) // 2, top + (_CELL - image.height) // 2))
        for line, (label, probability) in enumerate(row):
            text = f"{probability:.0%} {label}"
            draw.text((left + 4, top + _CELL + _LINE * line), text, fill="black", font=font)
    return sheet


def cell(pixels: Tensor) -> Image.Image:
    """An image [3, H, W] uint8 as large as fits into the grid."""
    return ImageOps.contain(to_pil_image(pixels), (_CELL - 4, _CELL - 4))
