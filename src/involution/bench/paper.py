"""A model of the GPU kernels: memory traffic, arithmetic, and the traffic between the tiles and the L2 cache.

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
from .registry import Workload, subject
from .timer import Row

_SECTOR = 32  # bytes of one L2 transaction


class Chip(NamedTuple):
    """Datasheet rates: bytes per second of memory, operations per second in float32 and on tensor cores in 16 bits."""

    name: str
    bandwidth: float
    float32: float
    matrices: float


CHIPS = (Chip("A100", 2.039e12, 19.5e12, 312e12), Chip("H100", 3.35e12, 66.9e12, 989e12))


@subject("paper", ("workloads",))
def paper(workloads: Sequence[Workload]) -> list[Row]:
    """Calculated for GPUs, float16 and channels_last: bytes, operations, microseconds, and the factor of L2 traffic.

    The time is the longer of memory's and arithmetic's. `L2` is what the programs read from and write to the L2 cache,
    over the memory traffic: neighbouring tiles overlap, and transactions are sectors of 32 bytes.
    """
    rows = []
    for case, batch in workloads:
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
            rows.append(row | {"L2": batch * l2_bytes(what, case) / size})
    return rows


def l2_bytes(what: str, case: Case) -> float:
    """Bytes that the programs of one image exchange with the L2 cache, when each requests every sector once."""
    window = (case.kernel_size,) * 2, case.output, (case.stride,) * 2, (case.kernel_size // 2,) * 2, (1, 1)
    geometry = Geometry(1, case.channels, case.groups, (case.height, case.width), *window)
    tile = gpu.tiles(what, geometry, True, torch.float16, case.channels // 4)[0]
    taps, block = case.kernel_size**2, tile.groups * tile.width  # the latter: channels of a program
    made = case.height * case.width if what == "adjoint" else math.prod(case.output)
    total = 0.0
    for first in range(0, made, tile.positions):
        positions = np.arange(first, min(first + tile.positions, made))[:, None]
        there, inside = _positions_read(what, case, positions)
        total += len(np.unique(there[inside])) * block * 2 + len(positions) * block * 2  # 2 bytes an element
        if what == "fused":
            weights = tile.groups * taps * case.channels // 4 * 2
            total += weights + len(positions) * case.channels // 4 * 2
        else:
            total += _kernel_map_bytes(what, case, positions, there, inside, min(tile.groups, case.groups))
    return math.ceil(case.channels / block) * total


def _positions_read(what: str, case: Case, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For every position of a tile and every tap: the flat position that it reads, and whether that exists."""
    k, s, taps = case.kernel_size, case.stride, np.arange(case.kernel_size**2)
    if what == "adjoint":  # the output positions that reach these input positions
        reach = positions // case.width + k // 2 - taps // k, positions % case.width + k // 2 - taps % k
        inside = (reach[0] % s == 0) & (reach[1] % s == 0)
        at, limits = (reach[0] // s, reach[1] // s), case.output
    else:
        columns = case.output[1]
        at = positions // columns * s + taps // k - k // 2, positions % columns * s + taps % k - k // 2
        inside, limits = np.ones_like(at[0], dtype=bool), (case.height, case.width)
    inside = inside & (at[0] >= 0) & (at[0] < limits[0]) & (at[1] >= 0) & (at[1] < limits[1])
    return at[0] * limits[1] + at[1], inside


def _kernel_map_bytes(
    what: str, case: Case, positions: np.ndarray, there: np.ndarray, inside: np.ndarray, groups: int
) -> int:
    """Whole sectors of the kernel map [O, G, K*K] that a tile touches."""
    taps = case.kernel_size**2
    kept = inside if what == "adjoint" else np.ones_like(inside)
    outputs = (there if what == "adjoint" else np.broadcast_to(positions, inside.shape))[kept]
    tap = np.broadcast_to(np.arange(taps), inside.shape)[kept]
    sectors = 0
    for group in range(groups):
        elements = (outputs * case.groups + group) * taps + tap
        sectors += len(np.unique(elements * 2 // _SECTOR))
    return sectors * _SECTOR
