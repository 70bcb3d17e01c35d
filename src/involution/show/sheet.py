"""Drawings over an image: heat maps of kernel sums, kernels at pixels, effective receptive fields, contact sheets.

All axes are in the image's pixels.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import FuncNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image
from torch import Tensor

from .kernels import kernel_heat
from .layers import Call, calls_of
from .view import Box, Grid, View

PREVIEW = 512  # longer side, in pixels, of the image below a drawing
CELL = 1.7  # a panel's width in inches
HEADINGS = ("footprints", *["sum of kernel"] * 3, *["kernel"] * 3, "receptive field")
Pixel = tuple[int, int]  # x, y


class Picture(NamedTuple):
    """An image, the view of it that the network receives, and the pixels at which kernels are drawn."""

    image: Image.Image
    view: View
    pixels: Sequence[Pixel]


class Shown(NamedTuple):
    """A call of a chosen layer, its grid in the network's input, and its receptive fields [H, W], one per pixel."""

    call: Call
    grid: Grid
    fields: Sequence[Tensor]

    @property
    def heat(self) -> Tensor:
        """The kernels' sums, [G, Ho, Wo]."""
        assert self.call.kernel_map is not None  # it is a chosen layer's
        return kernel_heat(self.call.kernel_map[None])[0]

    def kernel(self, position: Pixel, group: int) -> Tensor:
        """The kernel [Kh, Kw] of a group at a position (column, row)."""
        assert self.call.kernel_map is not None
        return self.call.kernel_map[group, :, :, position[1], position[0]]

    def position(self, picture: Picture, pixel: Pixel) -> Pixel:
        """The output position nearest to the centre of a pixel of the image."""
        return self.grid.position(*picture.view.to_input(pixel[0] + 0.5, pixel[1] + 0.5))

    def footprint(self, picture: Picture, pixel: Pixel) -> Box:
        """The box in the image that the kernel at a pixel covers."""
        return picture.view.to_image(self.grid.footprint(*self.position(picture, pixel)))


def draw_heat(picture: Picture, shown: Shown, title: str) -> Figure:
    """Heat maps of the kernels' sums over the image, one per group (paper, Figure 4)."""
    groups = len(shown.heat)
    figure, axes = _panels(-(-groups // 8), min(groups, 8), picture.image, title, left=0.1)
    for group, axis in enumerate(axes.flat[:groups]):
        _heat(axis, picture, shown, group)
        axis.set_title(f"group {group}", fontsize=7, pad=2)
    return figure


def draw_kernels_at(picture: Picture, shown: Shown, title: str) -> Figure:
    """A row per pixel: the footprint on the image, then the kernel of every group (16 at most) over a part of it."""
    groups = min(len(shown.heat), 16)
    figure, axes = _panels(len(picture.pixels), 1 + groups, picture.image, title, left=0.8, square=True)
    for row, pixel in zip(axes, picture.pixels, strict=True):
        _footprints(row[0], picture, shown, [pixel])
        _label(row[0], f"x {pixel[0]}\ny {pixel[1]}")
        for group, axis in enumerate(row[1:]):
            _kernel(axis, picture, shown, pixel, group)
            axis.set_title(f"group {group}", fontsize=7, pad=2)
    return figure


def draw_fields(picture: Picture, shown: Shown, title: str) -> Figure:
    """The effective receptive field at every pixel, over the image; the kernel's footprint is outlined."""
    figure, axes = _panels(1, len(picture.pixels), picture.image, title, left=0.1)
    for axis, pixel, field in zip(axes[0], picture.pixels, shown.fields, strict=True):
        _field(axis, picture, shown, pixel, field)
        axis.set_title(f"x {pixel[0]}, y {pixel[1]}", fontsize=7, pad=2)
    return figure


def draw_sheet(picture: Picture, rows: Sequence[Shown], title: str) -> Figure:
    """A row per layer: footprints of all pixels, then heat maps and kernels of three groups, and a receptive field.

    The groups are those whose kernel sums vary most over the positions. Kernels and receptive field are those at the
    first pixel. The label holds the layer's statistics.
    """
    columns = 8 if rows[0].fields else 7
    figure, axes = _panels(len(rows), columns, picture.image, title, left=2.3)
    calls = [shown.call for shown in rows]
    for axis, text in zip(axes[0], HEADINGS, strict=False):
        place = axis.get_position(original=True)
        figure.text(place.x0 + place.width / 2, place.y1, text, fontsize=8, ha="center", va="bottom")
    for row, shown in zip(axes, rows, strict=True):
        _label(row[0], _facts(shown.call, calls_of(calls, shown.call) > 1))
        _footprints(row[0], picture, shown, picture.pixels)
        for column, group in enumerate(most_varied(shown.heat, 3)):
            _heat(row[1 + column], picture, shown, group)
            _kernel(row[4 + column], picture, shown, picture.pixels[0], group)
            for axis in (row[1 + column], row[4 + column]):
                axis.text(0.03, 0.97, f"group {group}", fontsize=6, va="top", transform=axis.transAxes, **_BOX)
        if shown.fields:
            _field(row[7], picture, shown, picture.pixels[0], shown.fields[0])
    return figure


def most_varied(heat: Tensor, count: int) -> list[int]:
    """The groups of [G, Ho, Wo] with the largest standard deviation over positions, largest first."""
    order = heat.flatten(1).std(1, correction=0).sort(descending=True, stable=True).indices
    return order[:count].tolist()


_BOX: dict[str, Any] = {"bbox": {"facecolor": "white", "alpha": 0.7, "linewidth": 0, "pad": 1}}


def _facts(call: Call, numbered: bool) -> str:
    values = call.statistics
    return "\n".join(
        [
            f"{call.name}, call {call.number}" if numbered else call.name,
            f"{call.kernel}, {call.groups} group{'s' if call.groups > 1 else ''}",
            f"{call.output_size[0]}x{call.output_size[1]} positions",
            f"sum {values.sum:.3g} +- {values.sum_spread:.3g}",
            f"spread {values.spread:.3g}, {values.negative:.0%} negative",
        ]
    )


def _panels(
    rows: int, columns: int, image: Image.Image, title: str, left: float, square: bool = False
) -> tuple[Figure, "np.ndarray[Any, Any]"]:
    """A figure of equal panels with the image's aspect ratio (within 1:2); `left` is the labels' width in inches."""
    ratio = 1.0 if square else min(2.0, max(0.5, image.height / image.width))
    width, height = left + CELL * columns + 0.1, 0.75 + (CELL * ratio + 0.2) * rows
    longest = 0.08 * max(map(len, title.split("\n"))) + 0.2
    figure = Figure(figsize=(max(width, longest), height), dpi=110)
    figure.suptitle(title, fontsize=9, x=0.01, y=1 - 0.06 / height, ha="left", va="top")
    axes = figure.subplots(rows, columns, squeeze=False)
    figure.subplots_adjust(
        *(left / figure.get_figwidth(), 0.05 / height, (width - 0.1) / figure.get_figwidth(), 1 - 0.7 / height),
        wspace=0.06,
        hspace=0.2 / (CELL * ratio),
    )
    for axis in axes.flat:
        axis.axis("off")
    return figure, axes


def _image(axis: Axes, picture: Picture, grey: bool) -> None:
    """Draws the image, reduced, with its own pixels as coordinates."""
    preview = picture.image.copy()
    preview.thumbnail((PREVIEW, PREVIEW))
    if grey:
        preview = preview.convert("L").convert("RGB")
    axis.axis("on")
    axis.set_xticks([])
    axis.set_yticks([])
    axis.imshow(np.asarray(preview), extent=_extent((0, 0, *picture.image.size)))


def _over(axis: Axes, values: Tensor, box: Box, **options: Any) -> None:
    """Draws [h, w] values over a box of the image, which keeps its limits."""
    limits = axis.get_xlim(), axis.get_ylim()
    axis.imshow(values.detach().float().numpy(), extent=_extent(box), interpolation="nearest", **options)
    axis.set(xlim=limits[0], ylim=limits[1])


def _extent(box: Box) -> Box:
    """A box in matplotlib's order: left, right, bottom, top."""
    left, top, right, bottom = box
    return left, right, bottom, top


def _heat(axis: Axes, picture: Picture, shown: Shown, group: int) -> None:
    heat = shown.heat[group].float()
    low, high = heat.flatten().quantile(torch.tensor([0.02, 0.98])).tolist()
    if high - low < 1e-4 * max(1.0, abs(high)):  # the same everywhere: no colours for rounding errors
        low, high = low - 0.5, high + 0.5
    _image(axis, picture, grey=True)
    box = picture.view.to_image(shown.grid.extent())
    _over(axis, heat, box, cmap="viridis", vmin=low, vmax=high, alpha=0.65)


def _kernel(axis: Axes, picture: Picture, shown: Shown, pixel: Pixel, group: int) -> None:
    """The K x K weights over the part of the image around them: red is positive, blue negative, white 0.

    Colours follow the square root, because the centre's weight is often ten times the others'.
    """
    box = shown.footprint(picture, pixel)
    kernel = shown.kernel(shown.position(picture, pixel), group)
    largest = max(kernel.abs().max().item(), 1e-12)
    norm = FuncNorm((_signed_root, _signed_square), vmin=-largest, vmax=largest)
    opacity = 0.4 + 0.5 * (kernel.abs() / largest).float().sqrt().numpy()
    _image(axis, picture, grey=True)
    (left, top, right, bottom), margin = box, 0.15 * max(box[2] - box[0], box[3] - box[1])
    axis.set(xlim=(left - margin, right + margin), ylim=(bottom + margin, top - margin))
    _over(axis, kernel, box, cmap="RdBu_r", norm=norm, alpha=opacity)
    _outline(axis, box, "black")


def _signed_root(values: "np.ndarray[Any, Any]") -> "np.ndarray[Any, Any]":
    found: np.ndarray[Any, Any] = np.sign(values) * np.sqrt(np.abs(values))
    return found


def _signed_square(values: "np.ndarray[Any, Any]") -> "np.ndarray[Any, Any]":
    found: np.ndarray[Any, Any] = np.sign(values) * np.square(values)
    return found


def _footprints(axis: Axes, picture: Picture, shown: Shown, pixels: Sequence[Pixel]) -> None:
    _image(axis, picture, grey=False)
    for pixel in pixels:
        _outline(axis, shown.footprint(picture, pixel), f"C{picture.pixels.index(pixel) + 1}")


def _outline(axis: Axes, box: Box, colour: str) -> None:
    limits = axis.get_xlim(), axis.get_ylim()
    left, top, right, bottom = box
    axis.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor=colour, linewidth=1.5))
    axis.set(xlim=limits[0], ylim=limits[1])


def _field(axis: Axes, picture: Picture, shown: Shown, pixel: Pixel, field: Tensor) -> None:
    """Its square root, which lets small influences be seen, relative to the largest."""
    _image(axis, picture, grey=True)
    height, width = field.shape
    relative = (field / field.max().clamp(min=1e-30)).sqrt()
    _over(axis, relative, picture.view.to_image((0, 0, width, height)), cmap="magma", vmin=0, vmax=1, alpha=0.75)
    _outline(axis, shown.footprint(picture, pixel), "C2")


def _label(axis: Axes, text: str) -> None:
    axis.text(-0.05, 0.5, text, fontsize=7, ha="right", va="center", transform=axis.transAxes)


Drawing = Callable[[Picture, Shown, str], Figure]
DRAWINGS: dict[str, Drawing] = {"heat": draw_heat, "kernels": draw_kernels_at, "field": draw_fields}


def save(figure: Figure, file: Path) -> Path:
    """Writes a figure in the format of the file's suffix; its folder is created."""
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file)
    return file
