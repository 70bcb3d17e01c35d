"""The tiles of the GPU kernels: what one program computes, chosen by counted instructions (involution bench)."""

import math
from typing import NamedTuple

import torch

from ..geometry import Geometry

MOST_TAPS = 8  # of a row that a program unrolls


class Tile(NamedTuple):
    """What one program computes, and with how many warps.

    All are powers of two, except `width` for contiguous tensors: any number of channels of one group.
    """

    blocks: int  # of `columns` neighbouring positions of a row
    columns: int
    groups: int
    width: int  # channels of a group
    warps: int
    registers: int | None = None  # limit of a thread; set where NVIDIA's assembler would use fewer and spill


class Axis(NamedTuple):
    """How the taps of one axis move over an image: their number, the parts they are cut into, and the kernels' UNIT."""

    taps: int
    chunks: int
    unit: int

    @property
    def unrolled(self) -> int:
        """The taps of one part."""
        return -(-self.taps // self.chunks)


def residues(stride: int, dilation: int) -> tuple[int, int, int]:
    """STEP, BACK and INVERSE of an axis: see triton_indexing.residue_class."""
    common = math.gcd(stride, dilation)
    step, back = stride // common, dilation // common
    return step, back, pow(back, -1, step) if step > 1 else 0


def moves(name: str, geometry: Geometry) -> tuple[int, int, int]:
    """Taps of a row, and how far apart neighbouring positions and taps are in what the map reads."""
    kernel, stride, dilation = geometry.kernel[-1], geometry.stride[-1], geometry.dilation[-1]
    if name != "adjoint":
        return kernel, stride, dilation
    step, back, _ = residues(stride, dilation)
    return -(-kernel // step), 1, back


def last_axis(name: str, geometry: Geometry, columns: int) -> Axis:
    """How a map's kernel goes through a row of taps."""
    taps, stride, dilation = moves(name, geometry)
    return Axis(taps, -(-taps // MOST_TAPS), math.gcd(stride, dilation) if columns > 1 else dilation)


def _shared_columns(name: str, geometry: Geometry, most: int) -> int:
    """How many neighbouring positions a lane computes, up to `most`; several only if their windows overlap enough."""
    _, stride, dilation = moves(name, geometry)
    columns = most
    while columns > 1:
        axis = last_axis(name, geometry, columns)
        reads = ((columns - 1) * stride + (axis.unrolled - 1) * dilation) // axis.unit + 1
        if 4 * reads <= 3 * columns * axis.unrolled:
            break
        columns //= 2
    return columns


def tiles(name: str, geometry: Geometry, channels_last: bool, dtype: torch.dtype) -> list[Tile]:
    """The tiles that a map can choose from, the default first; none depends on an image's size."""
    width = geometry.channels // geometry.groups
    if channels_last:
        return _channels_last(name, geometry, width, dtype)
    return _contiguous(name, geometry, width, dtype)


def _contiguous(name: str, geometry: Geometry, width: int, dtype: torch.dtype) -> list[Tile]:
    most = 16 if dtype.itemsize < 8 else 8
    part = -(-width // -(-width // most))  # parts of one size
    return [
        Tile(32 * warps, _shared_columns(name, geometry, columns), 1, part, warps, None)
        for columns, warps in ((2, 2), (4, 2), (1, 4))
    ]


def _channels_last(name: str, geometry: Geometry, width: int, dtype: torch.dtype) -> list[Tile]:
    width, groups = power_of_two(width), power_of_two(geometry.groups)
    width = width if name == "correlate" else min(16, width)
    groups = min(groups, max(1, 64 // max(8, width)))
    columns = _shared_columns(name, geometry, 4 if dtype.itemsize < 8 and width <= 16 else 1)
    elements = 256  # of a warp, in each column
    warps = between(1, groups * width // elements, 8)
    # The assembler spills a few bytes of these where it may choose.
    registers = 255 if name == "correlate" or geometry.stride[-1] > 1 else None
    return [
        Tile(max(1, w * elements // (groups * width)), columns, groups, width, w, registers) for w in (warps, 2 * warps)
    ]


def fused_tile(geometry: Geometry, dtype: torch.dtype, features: int) -> Tile:
    """The fused layer's tile; its products need 16 positions at least, and the features of all of them in registers."""
    half = dtype.itemsize == 2  # else the products take more registers
    groups = min(16 if half else 8, power_of_two(geometry.groups))
    width = min(16, power_of_two(geometry.channels // geometry.groups))
    aligned = geometry.channels % 16 == 0
    positions = 32 if aligned and half else 16
    widest = max(groups * width, power_of_two(features))
    warps = between(2, positions * widest // (512 if aligned else 128), 8 if half else 4)
    return Tile(positions, 1, groups, width, warps, None if half and groups > 2 else 255)


def power_of_two(number: int) -> int:
    """The smallest power of two >= number."""
    return 1 << (number - 1).bit_length()


def between(low: int, number: int, high: int) -> int:
    """The number, clamped to low..high."""
    return max(low, min(number, high))
