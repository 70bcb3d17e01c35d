"""The three maps of the operator, and the sizes of one call, as registrations and backends share them.

Involution is linear in the input and in the kernel map, so T(x, k, g) = <y(x, k), g> is a trilinear form of three
tensors, each with a role:

    input       x  [N, C, *S]
    kernel_map  k  [N, G, *K, *O]
    output      y  [N, C, *O]      (and its gradient g)

Each gradient of T is a map that takes tensors of two roles and returns the third: apply, adjoint and correlate. The
gradients of a map are again these three maps, so derivatives of any order need nothing else.
"""

from collections.abc import Iterator, Sequence
from itertools import product
from types import EllipsisType
from typing import NamedTuple

import torch

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
LARGEST = 2**31 - 1  # stride, padding or dilation: keeps positions far from the limits of 64 bits
Index = tuple[int | slice | EllipsisType, ...]


class Map(NamedTuple):
    """One gradient of the trilinear form: its name, the roles of its arguments and the role of its result."""

    name: str
    takes: tuple[str, str]
    makes: str


MAPS = (
    Map("apply", ("input", "kernel_map"), "output"),
    Map("adjoint", ("output", "kernel_map"), "input"),
    Map("correlate", ("output", "input"), "kernel_map"),
)


class Geometry(NamedTuple):
    """The sizes of one call. Spatial fields have one entry per axis; `padding` is the left side's.

    The right side's padding follows from the output size. Taps outside the input are skipped on either side.
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
        """Every kernel tap with a position inside the input, as indices into the kernel map, the output and the input.

        They select the tap's weights, the output positions that use them, and the input positions that they multiply.
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
        ValueError: the shapes do not fit each other, or a stride or dilation is not positive.
    """
    dims = len(stride)
    x, k, y = shapes["input"], shapes["kernel_map"], shapes["output"]
    fit = (
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
    if not fit:
        raise ValueError(
            f"shapes do not fit each other: input {list(x)}, kernel_map {list(k)}, output {list(y)}; wanted "
            f"[N, C, *S], [N, G, *K, *O] and [N, C, *O] with G dividing C, for stride {list(stride)}, "
            f"padding {list(padding)} and dilation {list(dilation)} of one int per spatial axis"
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
