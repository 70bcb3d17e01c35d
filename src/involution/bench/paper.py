"""The GPU kernels on paper: what a layer must move and compute, and what the tiles ask of the second cache.

Calculated from datasheets and from the kernels' tiling; nothing here is measured.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from ..ops.backends import triton as gpu
from ..ops.geometry import Geometry
from .cases import Case
from .timer import Row

_SECTOR = 32  # bytes that the second cache hands out at a time


class Chip(NamedTuple):
    """Datasheet rates: bytes a second of memory, and operations a second in float32 and on matrix units in 16 bits."""

    name: str
    bandwidth: float
    float32: float
    matrices: float


CHIPS = (Chip("A100", 2.039e12, 19.5e12, 312e12), Chip("H100", 3.35e12, 66.9e12, 989e12))


def paper(cases: Sequence[Case], batches: Sequence[int]) -> list[Row]:
    """For every layer, in float16 and channels_last: bytes, operations, microseconds, and bytes asked of the cache.

    The time is the longer of memory's and arithmetic's. `L2` is what the programs ask of the second cache, over what
    has to be moved: every tile fetches what its neighbours fetch too, in sectors of 32 bytes.
    """
    rows = []
    for batch in batches:
        for case in cases:
            for what in ("apply", "adjoint", "correlate", "fused"):
                fused = what == "fused"
                size = (case.fused_bytes(batch) if fused else case.bytes(batch)) / 2
                row: Row = {"what": what, "case": case.name, "batch": batch, "MB": size / 1e6}
                row["GFLOP"] = (case.fused_flops(batch) if fused else case.flops(batch)) / 1e9
                for chip in CHIPS:
                    arithmetic = case.flops(batch) / chip.float32
                    if fused:
                        arithmetic += (case.fused_flops(batch) - case.flops(batch)) / chip.matrices
                    row[f"{chip.name}, us"] = max(size / chip.bandwidth, arithmetic) * 1e6
                rows.append(row | {"L2": batch * asked_of_l2(what, case) / size})
    return rows


def asked_of_l2(what: str, case: Case) -> float:
    """Bytes that the programs of one image read and write, when a program asks for every sector once."""
    k, s, columns = case.kernel_size, case.stride, case.output[1]
    window = (k, k), case.output, (s, s), (k // 2, k // 2), (1, 1)
    geometry = Geometry(1, case.channels, case.groups, (case.height, case.width), *window)
    tile = gpu.tiles(what, geometry, True, torch.float16, case.channels // 4)[0]
    block = tile.groups * tile.width  # channels of a program
    blocks = math.ceil(case.channels / block)
    made = case.height * case.width if what == "adjoint" else math.prod(case.output)
    taps = np.arange(k * k)
    images = maps = weights = 0.0
    for first in range(0, made, tile.positions):
        p = np.arange(first, min(first + tile.positions, made))[:, None]
        if what == "adjoint":  # output positions that reach these input positions
            i = p // case.width + k // 2 - taps // k, p % case.width + k // 2 - taps % k
            inside = (i[0] % s == 0) & (i[1] % s == 0)
            at = i[0] // s, i[1] // s
            limits = case.output
        else:
            at = p // columns * s + taps // k - k // 2, p % columns * s + taps % k - k // 2
            inside, limits = np.ones_like(at[0], dtype=bool), (case.height, case.width)
        inside = inside & (at[0] >= 0) & (at[0] < limits[0]) & (at[1] >= 0) & (at[1] < limits[1])
        there = (at[0] * limits[1] + at[1])[inside]
        images += len(np.unique(there)) * block * 2 + len(p) * block * 2  # read, and written or (correlate) read
        if what == "fused":
            weights += tile.groups * k * k * case.channels // 4 * 2
            images += len(p) * case.channels // 4 * 2
            continue
        # The kernel map's numbers [O, G, K*K], those of the program's first groups.
        o = np.broadcast_to(p, inside.shape) if what != "adjoint" else at[0] * limits[1] + at[1]
        u = np.broadcast_to(taps, inside.shape)
        kept = inside if what == "adjoint" else np.ones_like(inside)
        for group in range(min(tile.groups, case.groups)):
            numbers = (o[kept] * case.groups + group) * k * k + u[kept]
            maps += len(np.unique(numbers * 2 // _SECTOR)) * _SECTOR
    return blocks * (images + maps + weights)
