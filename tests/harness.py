"""The configuration of a test process: backends, instruction sets, threads, and the number of random examples."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from involution.ops.backends import cpu_library, selection, triton
from involution.ops.backends.triton_tiles import power_of_two
from involution.ops.geometry import Geometry

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # this process tests Triton's kernels, on CPU tensors
BACKENDS = [name for name, module in selection._BACKENDS.items() if not module.why_not(torch.empty(0))]
if INTERPRETED:
    BACKENDS = ["triton"]
TILES = triton.tiles
LIBRARY = cpu_library.library()
assert LIBRARY is not None, cpu_library.why_not_loaded()
INSTRUCTION_SETS = [name for name in ("avx512", "avx2", "baseline") if LIBRARY.involution_use(name.encode())]
LIBRARY.involution_use(INSTRUCTION_SETS[0].encode())


def one_tile(name: str, geometry: Geometry, channels_last: bool, dtype: torch.dtype) -> list[triton.Tile]:
    """One program for an image: the interpreter's time is per operation, however many elements it has.

    For contiguous tensors a group's channels are operations of their own, up to 16 of them.
    """
    tile = TILES(name, geometry, channels_last, dtype)[0]
    width, groups = geometry.channels // geometry.groups, geometry.groups
    positions = power_of_two(int(max(np.prod(geometry.input), np.prod(geometry.output))))
    if channels_last:
        return [tile._replace(blocks=positions, groups=power_of_two(groups), width=power_of_two(width))]
    return [tile._replace(blocks=positions)]


def use_tiles(patch: pytest.MonkeyPatch, tiles: Callable[..., list[triton.Tile]]) -> None:
    """Launches with other tiles: what was decided before is forgotten."""
    triton.plan.cache_clear()
    patch.setattr(triton, "tiles", tiles)


def examples(count: int) -> int:
    """The number of random examples: `count`, times INVOLUTION_EXAMPLES if set."""
    return max(1, round(count * float(os.environ.get("INVOLUTION_EXAMPLES", "1"))))


@contextmanager
def backend(name: str, instruction_set: str | None = None) -> Iterator[None]:
    """Runs the block on one backend and, on the CPU, with one instruction set."""
    before = selection.forced
    selection.forced = name
    try:
        if instruction_set is not None:
            assert LIBRARY.involution_use(instruction_set.encode())
        yield
    finally:
        selection.forced = before
        LIBRARY.involution_use(INSTRUCTION_SETS[0].encode())


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Runs the block with this number of torch threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
