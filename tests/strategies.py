"""Hypothesis strategies for calls of the operator: shapes, windows, dtypes and layouts."""

from typing import NamedTuple

import numpy as np
import torch
from harness import INSTRUCTION_SETS
from hypothesis import strategies as st


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
    """Any geometry small enough for the oracle's loop, including long rows, wide groups and common windows."""
    fast_kernel = draw(st.sampled_from([1, 2, 3, 3, 4, 5, 5, 7, 7, 7]))
    kernel = (*(draw(st.integers(1, 3)) for _ in range(dims - 1)), fast_kernel)
    stride = (*(draw(st.integers(1, 3)) for _ in range(dims - 1)), draw(st.sampled_from([1, 1, 1, 2, 2, 3])))
    dilation = tuple(draw(st.sampled_from([1, 1, 1, 2, 3])) for _ in range(dims))
    padding = tuple(draw(st.integers(0, d * (k - 1) + 1)) for k, d in zip(kernel, dilation, strict=True))
    sizes = []
    for axis in range(dims):
        minimum = max(1, dilation[axis] * (kernel[axis] - 1) + 1 - 2 * padding[axis])
        maximum = 24 if axis == dims - 1 else 5
        sizes.append(draw(st.integers(minimum, max(minimum, maximum))))
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
