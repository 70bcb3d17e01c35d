"""The sizes of one call, which the public functions, the registrations and every backend share.

Three tensors meet in the form T(x, k, g) = <y(x, k), g>, and each has a role:

    input       x  [N, C, *S]
    kernel_map  k  [N, G, *K, *O]
    output      y  [N, C, *O]      (and its gradient g)

A map takes two of the roles and makes the third.
"""

from collections.abc import Iterator, Sequence
from itertools import product
from types import EllipsisType
from typing import NamedTuple

import torch

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
LARGEST = 2**31 - 1  # of a stride, padding or dilation: positions computed from them stay far inside 64 bits
Index = tuple[int | slice | EllipsisType, ...]


class Map(NamedTuple):
    """One of the three gradients of the trilinear form: its name, the roles it takes and the role it makes."""

    name: str
    takes: tuple[str, str]
    makes: str


MAPS = (
    Map("apply", ("input", "kernel_map"), "output"),
    Map("adjoint", ("output", "kernel_map"), "input"),
    Map("correlate", ("output", "input"), "kernel_map"),
)


class Geometry(NamedTuple):
    """The sizes of one call. Spatial entries have one number per axis; `padding` is that of the left side.

    The right side's padding follows from the output size: taps outside the input are skipped, wherever they are.
    """

    batch: int
    channels: int
    groups: int
    input: tuple[int, ...]
    kernel: tuple[int, ...]
    output: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]

    def taps(self) -> Iterator[tuple[Index, Index, Index]]:
        """Every tap that meets the input somewhere, as three indices: into the kernel map, the output and the input.

        They pick the weights, the output positions that these weights serve, and the input positions they multiply.
        """
        for tap in product(*(range(k) for k in self.kernel)):
            at_output, at_input = [], []
            for axis, u in enumerate(tap):
                step = self.stride[axis]
                shift = u * self.dilation[axis] - self.padding[axis]  # input position = output position * step + shift
                first = max(0, -(shift // step))
                last = min(self.output[axis] - 1, (self.input[axis] - 1 - shift) // step)
                if first > last:
                    break
                at_output.append(slice(first, last + 1))
                at_input.append(slice(first * step + shift, last * step + shift + 1, step))
            else:
                yield (slice(None), slice(None), *tap, *at_output), (..., *at_output), (..., *at_input)


def geometry(
    shapes: dict[str, Sequence[int]], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> Geometry:
    """The geometry of three shapes, keyed by role.

    Raises:
        ValueError: the shapes do not belong together, or a stride or dilation is not positive.
    """
    dims = len(stride)
    x, k, y = shapes["input"], shapes["kernel_map"], shapes["output"]
    agree = (
        1 <= dims <= 3
        and len(padding) == len(dilation) == dims
        and len(x) == len(y) == dims + 2
        and len(k) == 2 * dims + 2
        and x[0] == y[0] == k[0]
        and x[1] == y[1]
        and k[1] > 0
        and x[1] % k[1] == 0
        and tuple(k[2 + dims :]) == tuple(y[2:])
    )
    if not agree:
        raise ValueError(
            f"shapes do not belong together: input {list(x)}, kernel_map {list(k)}, output {list(y)}; wanted "
            f"[N, C, *S], [N, G, *K, *O] and [N, C, *O] with G dividing C, for stride {list(stride)}, "
            f"padding {list(padding)} and dilation {list(dilation)} of one number per spatial axis"
        )
    if min(*stride, *dilation) < 1 or min(padding) < 0 or max(*stride, *dilation, *padding) > LARGEST:
        raise ValueError(
            f"stride and dilation must be positive, padding not negative, and all at most {LARGEST}, got "
            f"{list(stride)}, {list(dilation)} and {list(padding)}"
        )
    if min(*x[1:], *k[1:]) < 1:
        raise ValueError(f"no axis but the batch may be empty, got input {list(x)} and kernel_map {list(k)}")
    return Geometry(
        x[0],
        x[1],
        k[1],
        tuple(x[2:]),
        tuple(k[2 : 2 + dims]),
        tuple(y[2:]),
        tuple(stride),
        tuple(padding),
        tuple(dilation),
    )
