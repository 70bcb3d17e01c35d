"""Shapes and memory layouts of one call: what the front door, the registrations and every backend share.

Three tensors meet in the form T(x, k, g) = <y(x, k), g>, and each has a role:

    input       x  [N, C, *S]
    kernel_map  k  [N, G, *K, *O]
    output      y  [N, C, *O]      (and its gradient g)

A map takes two of the roles and makes the third.
"""

import math
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import product
from types import EllipsisType
from typing import NamedTuple

import torch
from torch import Tensor

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


class LayerParts(NamedTuple):
    """The tensors of a fused layer (ops/fused.py); None leaves a step out.

    Weights are [out, in], or packed (see `pack`): [ceil(out / 32), in, 32], and then the bias says how many `out` are.
    """

    input: Tensor
    hidden: Tensor | None  # or made from the input by the reduction
    reduce_weight: Tensor | None
    reduce_bias: Tensor | None
    span_weight: Tensor
    span_bias: Tensor | None
    scale: Tensor | None = None
    shift: Tensor | None = None
    next_weight: Tensor | None = None
    next_bias: Tensor | None = None
    shortcut: Tensor | None = None
    following_weight: Tensor | None = None
    following_bias: Tensor | None = None
    relu: bool = False
    next_relu: bool = False
    rms_eps: float = 0.0  # above 0, the reduced features are divided by their RMS at every position, before their ReLU

    def tensors(self) -> tuple[Tensor | None, ...]:
        """All but the options, in order."""
        return tuple(self[:-3])

    def output_sizes(self, positions: Sequence[int]) -> list[tuple[int, ...]]:
        """[N, C or the next convolution's channels, *positions], and the following convolution's where there is one."""
        batch, channels = self.input.shape[:2]
        if self.next_weight is not None:
            channels = _columns(self.next_weight, self.next_bias)
        sizes = [(batch, channels, *positions)]
        if self.following_weight is not None:
            sizes.append((batch, _columns(self.following_weight, self.following_bias), *positions))
        return sizes


PANEL = 32  # columns, as csrc/multiply.h has it


def pack(weight: Tensor) -> Tensor:
    """A weight [out, in] as the CPU kernels read it: [ceil(out / 32), in, 32], filled up with zeros."""
    missing = -weight.shape[0] % PANEL
    padded = torch.nn.functional.pad(weight, (0, 0, 0, missing)) if missing else weight
    return padded.unflatten(0, (-1, PANEL)).transpose(1, 2).contiguous()


def _columns(weight: Tensor, bias: Tensor | None) -> int:
    """How many outputs a weight has that may be packed."""
    return (weight if bias is None else bias).shape[0]


def unpack(weight: Tensor, bias: Tensor | None) -> Tensor:
    """The weight [out, in], packed or not; a packed one's `out` is that of its bias."""
    if weight.dim() == 2:
        return weight
    assert bias is not None
    return weight.transpose(1, 2).flatten(0, 1)[: bias.shape[0]]


def layer_output(input: Sequence[int], stride: Sequence[int]) -> list[int]:
    """A layer's output positions per axis: ceil(S / stride)."""
    return [-(-size // step) for size, step in zip(input, stride, strict=True)]


def layer_window(
    input: Sequence[int], maps: int, kernel_size: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> Geometry:
    """The geometry of a layer whose span has `maps` = G * prod(K) outputs; it makes ceil(S / stride) positions.

    Raises:
        ValueError: the sizes do not belong together.
    """
    dims = len(input) - 2
    for name, axes in (("kernel_size", kernel_size), ("stride", stride), ("dilation", dilation)):
        if len(axes) != dims or min(axes) < 1 or max(axes) > LARGEST:
            raise ValueError(f"{name} must be {dims} numbers from 1 to {LARGEST}, got {list(axes)}")
    taps = math.prod(kernel_size)
    if taps < 1 or maps % taps != 0:
        raise ValueError(f"span_weight must have G * {taps} rows for kernel_size {list(kernel_size)}, got {maps}")
    groups, output = maps // taps, layer_output(input[2:], stride)
    if groups == 0 or input[1] % groups != 0:
        raise ValueError(
            f"span_weight must have G * {taps} rows with G dividing input's {input[1]} channels, got {maps}, "
            f"which is G = {groups}"
        )
    shapes: dict[str, Sequence[int]] = {
        "input": input,
        "kernel_map": (input[0], groups, *kernel_size, *output),
        "output": (input[0], input[1], *output),
    }
    padding = [d * (k - 1) // 2 for k, d in zip(kernel_size, dilation, strict=True)]
    return geometry(shapes, stride, padding, dilation)


def is_channels_last(image: Tensor) -> bool:
    """Whether an [N, C, *S] tensor lies in memory as [N, *S, C], and not as [N, C, *S] too."""
    return not image.is_contiguous() and lies_channels_last(image)


def lies_channels_last(image: Tensor) -> bool:
    """Whether an [N, C, *S] tensor lies in memory as [N, *S, C]."""
    if image.dim() == 4:
        return image.is_contiguous(memory_format=torch.channels_last)
    return image.movedim(1, -1).is_contiguous()


@cache
def memory_order(role: str, dims: int) -> tuple[int, ...]:
    """The permutation that takes a tensor of this role to its channels-last memory order.

    [N, C, *S] -> [N, *S, C], and the kernel map [N, G, *K, *O] -> [N, *O, G, *K]: what a channels-last 1x1
    convolution with G * prod(K) outputs leaves behind.
    """
    if role == "kernel_map":
        return (0, *range(2 + dims, 2 + 2 * dims), 1, *range(2, 2 + dims))
    return (0, *range(2, 2 + dims), 1)


def allocate(role: str, size: Sequence[int], like: Tensor) -> Tensor:
    """An uninitialised result of this role: channels-last exactly if `like` (an image) is and is not also contiguous.

    The kernels and their fakes both call this, so that strides never disagree.
    """
    if not is_channels_last(like):
        return torch.empty(tuple(size), dtype=like.dtype, device=like.device)
    order = memory_order(role, like.dim() - 2)
    return torch.empty_permuted(tuple(size), order, dtype=like.dtype, device=like.device)


@cache
def logical_order(role: str, dims: int) -> tuple[int, ...]:
    """The permutation that brings a tensor of this role back from its channels-last memory order."""
    order = memory_order(role, dims)
    return tuple(order.index(axis) for axis in range(len(order)))
