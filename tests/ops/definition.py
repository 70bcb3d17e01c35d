"""The definition of OPERATOR.md as a float64 loop, gradients included, and random geometries to hold it against."""

import os
from contextlib import contextmanager
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import torch
from hypothesis import strategies as st

from involution.ops import cpu, gpu, selection
from involution.ops.geometry import Geometry

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # then this process tests Triton's kernels, on CPU tensors
BACKENDS = ["triton"] if INTERPRETED else ["cpu", "reference"]
TILES = gpu.tiles
LIBRARY = cpu.library()
assert LIBRARY is not None, cpu.why_not(None)
INSTRUCTION_SETS = [name for name in ("avx512", "avx2", "baseline") if LIBRARY.involution_use(name.encode())]
LIBRARY.involution_use(INSTRUCTION_SETS[0].encode())


def one_tile(name: str, geometry: Geometry, *rest: Any) -> list[gpu.Tile]:
    """One program for an image: the interpreter takes its time for every operation, however many numbers it has."""
    width, groups = geometry.channels // geometry.groups, geometry.groups
    positions = max(np.prod(geometry.input), np.prod(geometry.output))
    return [gpu.Tile(*(1 << (int(size) - 1).bit_length() for size in (max(16, positions), groups, width)), 1)]


if INTERPRETED:  # test_gpu_interpreted.py tries the tiles that are really launched
    gpu.tiles = one_tile


def examples(count: int) -> int:
    """How many random examples to try where `count` are usual: INVOLUTION_EXAMPLES says what part of them."""
    return max(1, round(count * float(os.environ.get("INVOLUTION_EXAMPLES", "1"))))


@contextmanager
def backend(name: str, instruction_set: str | None = None):
    """Runs the block on one backend, and on one of the CPU's instruction sets."""
    before = selection.forced
    selection.forced = name
    try:
        if instruction_set is not None:
            assert LIBRARY.involution_use(instruction_set.encode())
        yield
    finally:
        selection.forced = before
        LIBRARY.involution_use(INSTRUCTION_SETS[0].encode())


class Call(NamedTuple):
    """A random call: shapes, window, dtype and layout."""

    batch: int
    groups: int
    width: int  # channels per group
    input: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    dtype: torch.dtype
    channels_last: bool
    instruction_set: str

    @property
    def dims(self) -> int:
        return len(self.kernel)

    @property
    def output(self) -> tuple[int, ...]:
        axes = zip(self.input, self.kernel, self.stride, self.padding, self.dilation, strict=True)
        return tuple((size + 2 * p - d * (k - 1) - 1) // s + 1 for size, k, s, p, d in axes)

    def tensors(self, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """input, kernel map and output gradient, in the call's dtype and layout."""
        generator = torch.Generator().manual_seed(seed)
        channels = self.groups * self.width
        shapes = [
            (self.batch, channels, *self.input),
            (self.batch, self.groups, *self.kernel, *self.output),
            (self.batch, channels, *self.output),
        ]
        x, k, g = (torch.randn(shape, generator=generator, dtype=torch.float64).to(self.dtype) for shape in shapes)
        if self.channels_last:
            x, g = (t.movedim(1, -1).contiguous().movedim(-1, 1) for t in (x, g))
            flat = k.flatten(1, 1 + self.dims).movedim(1, -1).contiguous().movedim(-1, 1)
            k = flat.unflatten(1, (self.groups, *self.kernel))
        return x, k, g


@st.composite
def calls(draw: st.DrawFn, dims: int) -> Call:
    """Any geometry small enough for the loop, with long rows, wide groups and the usual windows among them."""
    fast_kernel = draw(st.sampled_from([1, 2, 3, 3, 4, 5, 5, 7, 7, 7]))
    kernel = (*(draw(st.integers(1, 3)) for _ in range(dims - 1)), fast_kernel)
    stride = (*(draw(st.integers(1, 3)) for _ in range(dims - 1)), draw(st.sampled_from([1, 1, 1, 2, 2, 3])))
    dilation = tuple(draw(st.sampled_from([1, 1, 1, 2, 3])) for _ in range(dims))
    padding = tuple(draw(st.integers(0, d * (k - 1) + 1)) for k, d in zip(kernel, dilation, strict=True))
    sizes = []
    for axis in range(dims):
        least = max(1, dilation[axis] * (kernel[axis] - 1) + 1 - 2 * padding[axis])
        most = 24 if axis == dims - 1 else 5
        sizes.append(draw(st.integers(least, max(least, most))))
    call = Call(
        batch=draw(st.integers(1, 2)),
        groups=draw(st.integers(1, 3)),
        width=draw(st.sampled_from([1, 2, 3, 4, 8, 16, 16, 16, 19, 32])),
        input=tuple(sizes),
        kernel=kernel,
        stride=stride,
        padding=padding,
        dilation=dilation,
        dtype=draw(st.sampled_from([torch.float32, torch.float32, torch.float64, torch.float16, torch.bfloat16])),
        channels_last=draw(st.booleans()),
        instruction_set=draw(st.sampled_from(INSTRUCTION_SETS)),
    )
    if call.batch * np.prod(call.output) * np.prod(call.kernel) > 900:
        call = call._replace(
            batch=1, input=(*(min(s, 2 * d + 1) for s, d in zip(sizes[:-1], dilation, strict=False)), sizes[-1])
        )
    return (
        call
        if min(call.output) > 0
        else call._replace(padding=tuple(d * (k - 1) for k, d in zip(kernel, dilation, strict=True)))
    )


def loop(call: Call, x: torch.Tensor, k: torch.Tensor, g: torch.Tensor) -> list[torch.Tensor]:
    """y, dx and dk in float64, term by term."""
    x, k, g = (t.double().numpy() for t in (x, k, g))
    y, dx, dk = np.zeros(g.shape), np.zeros(x.shape), np.zeros(k.shape)
    for n in range(call.batch):
        for o in product(*(range(size) for size in call.output)):
            for u in product(*(range(size) for size in call.kernel)):
                i = tuple(o[a] * call.stride[a] + u[a] * call.dilation[a] - call.padding[a] for a in range(call.dims))
                if any(i[a] < 0 or i[a] >= call.input[a] for a in range(call.dims)):
                    continue
                at_x, at_y = (n, slice(None), *i), (n, slice(None), *o)
                weights = np.repeat(k[(n, slice(None), *u, *o)], call.width)
                y[at_y] += weights * x[at_x]
                dx[at_x] += weights * g[at_y]
                dk[(n, slice(None), *u, *o)] += (g[at_y] * x[at_x]).reshape(call.groups, call.width).sum(1)
    return [torch.from_numpy(t) for t in (y, dx, dk)]
