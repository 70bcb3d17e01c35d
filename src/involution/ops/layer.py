"""The fused layer's operands, the checks of their sizes, and its steps in plain PyTorch.

Its 1x1 convolutions: reduce computes the generator's hidden features; span produces the kernels from them; expand ends
a bottleneck; next_reduce is the next bottleneck's first.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from .geometry import DTYPES, LARGEST, Geometry, geometry
from .layouts import logical_order


class LayerParts(NamedTuple):
    """The operands of a fused layer or bottleneck (fused.py); None omits a step.

    Weights are [out, in], or packed (see `pack`): [ceil(out / 32), in, 32], where the bias has `out` elements.
    """

    input: Tensor
    hidden: Tensor | None  # None: computed from the input by the reduction
    reduce_weight: Tensor | None
    reduce_bias: Tensor | None
    span_weight: Tensor
    span_bias: Tensor | None
    scale: Tensor | None = None
    shift: Tensor | None = None
    expand_weight: Tensor | None = None
    expand_bias: Tensor | None = None
    shortcut: Tensor | None = None
    next_reduce_weight: Tensor | None = None
    next_reduce_bias: Tensor | None = None
    relu: bool = False
    expand_relu: bool = False
    rms_eps: float = 0.0  # above 0: an RMS norm over channels between the reduction and its ReLU

    def tensors(self) -> tuple[Tensor | None, ...]:
        """The tensors, in order: all but the last three fields."""
        return tuple(self[:-3])

    def output_sizes(self, output_size: Sequence[int]) -> list[tuple[int, ...]]:
        """Sizes of the results: the output's and, with `next_reduce_weight`, the next block's reduced features'."""
        batch, channels = self.input.shape[:2]
        if self.expand_weight is not None:
            channels = _out_channels(self.expand_weight, self.expand_bias)
        sizes = [(batch, channels, *output_size)]
        if self.next_reduce_weight is not None:
            sizes.append((batch, _out_channels(self.next_reduce_weight, self.next_reduce_bias), *output_size))
        return sizes


PANEL = 32  # columns of a packed weight panel, as in csrc/gemm.h


def pack(weight: Tensor) -> Tensor:
    """A weight [out, in] in the CPU kernels' packed layout: [ceil(out / 32), in, 32], zero-padded."""
    missing = -weight.shape[0] % PANEL
    padded = torch.nn.functional.pad(weight, (0, 0, 0, missing)) if missing else weight
    return padded.unflatten(0, (-1, PANEL)).transpose(1, 2).contiguous()


def _out_channels(weight: Tensor, bias: Tensor | None) -> int:
    """`out` of a weight that may be packed."""
    return (weight if bias is None else bias).shape[0]


def unpack(weight: Tensor, bias: Tensor | None) -> Tensor:
    """The weight as [out, in], from either layout."""
    if weight.dim() == 2:
        return weight
    assert bias is not None
    return weight.transpose(1, 2).flatten(0, 1)[: bias.shape[0]]


def layer_output(input: Sequence[int], stride: Sequence[int]) -> list[int]:
    """A layer's output size per axis: ceil(S / stride).

    It is written as convolution's formula so that symbolic sizes can be proved equal.
    """
    return [(size - 1) // step + 1 for size, step in zip(input, stride, strict=True)]


def layer_geometry(
    input: Sequence[int], span_channels: int, kernel_size: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> Geometry:
    """The geometry of a layer with `span_channels` = G * prod(K) span outputs and output size ceil(S / stride).

    Raises:
        ValueError: the sizes do not fit each other.
    """
    dims = len(input) - 2
    for name, axes in (("kernel_size", kernel_size), ("stride", stride), ("dilation", dilation)):
        if len(axes) != dims or min(axes) < 1 or max(axes) > LARGEST:
            raise ValueError(f"{name} must be {dims} ints from 1 to {LARGEST}, got {list(axes)}")
    taps = math.prod(kernel_size)
    if taps < 1 or span_channels % taps != 0:
        raise ValueError(
            f"span_weight must have G * {taps} rows for kernel_size {list(kernel_size)}, got {span_channels}"
        )
    groups, output = span_channels // taps, layer_output(input[2:], stride)
    if groups == 0 or input[1] % groups != 0:
        raise ValueError(
            f"span_weight must have G * {taps} rows with G dividing input's {input[1]} channels, got {span_channels}, "
            f"which is G = {groups}"
        )
    shapes: dict[str, Sequence[int]] = {
        "input": input,
        "kernel_map": (input[0], groups, *kernel_size, *output),
        "output": (input[0], input[1], *output),
    }
    padding = [d * (k - 1) // 2 for k, d in zip(kernel_size, dilation, strict=True)]
    return geometry(shapes, stride, padding, dilation)


def checked_geometry(parts: LayerParts, geometry_arguments: Sequence[Sequence[int]]) -> Geometry:
    """The geometry of a fused layer; raises unless its operands fit each other.

    `geometry_arguments` are kernel_size, stride and dilation.
    """
    dtype, device = parts.input.dtype, parts.input.device
    shapes = []
    for name, tensor in zip(parts._fields, parts.tensors(), strict=False):
        if tensor is not None and (tensor.dtype != dtype or tensor.device != device or dtype not in DTYPES):
            raise TypeError(
                f"{name} must have input's floating dtype and device, {dtype} on {device}, got {tensor.dtype} on "
                f"{tensor.device}"
            )
        shapes.append(None if tensor is None else tensor.shape)
    return _checked_shapes(tuple(shapes), tuple(tuple(axes) for axes in geometry_arguments))


@lru_cache(maxsize=1024)
def _checked_shapes(
    shapes: tuple[Sequence[int] | None, ...], geometry_arguments: tuple[tuple[int, ...], ...]
) -> Geometry:
    """The geometry of a fused layer whose operands have these shapes; raises unless they fit."""
    given = dict(zip(LayerParts._fields, shapes, strict=False))
    for name in ("reduce", "span", "expand", "next_reduce"):
        given[f"{name}_weight"] = unpacked_shape(name, given[f"{name}_weight"], given[f"{name}_bias"])
    _check_combination(given)
    x, span, expand, next_reduce = (
        given[name] for name in ("input", "span_weight", "expand_weight", "next_reduce_weight")
    )
    assert x is not None
    assert span is not None
    sizes = layer_geometry(x, span[0], *geometry_arguments)
    channels = sizes.channels
    expected: dict[str, tuple[int, ...]] = {
        "hidden": (x[0], span[1], *sizes.output),
        "reduce_weight": (span[1], channels),
        "reduce_bias": (span[1],),
        "span_bias": (span[0],),
        "scale": (channels,),
        "shift": (channels,),
    }
    if expand:
        expected |= {"expand_weight": (expand[0], channels), "expand_bias": (expand[0],)}
        expected |= {"shortcut": (x[0], expand[0], *sizes.output)}
    if expand and next_reduce:
        expected |= {"next_reduce_weight": (next_reduce[0], expand[0]), "next_reduce_bias": (next_reduce[0],)}
    for name, shape in expected.items():
        actual = given[name]
        if actual is not None and tuple(actual) != shape:
            raise ValueError(f"{name} must be {list(shape)} for input {list(x)}, got {list(actual)}")
    return sizes


def _check_combination(given: dict[str, Sequence[int] | None]) -> None:
    """Raises unless the operands that need each other are given together."""
    for name in ("reduce", "expand", "next_reduce"):
        if given[f"{name}_weight"] is None and given[f"{name}_bias"] is not None:
            raise ValueError(f"{name}_bias must come with {name}_weight")
    for name in ("shortcut", "next_reduce_weight"):
        if given["expand_weight"] is None and given[name] is not None:
            raise ValueError(f"{name} must come with expand_weight")
    if (given["hidden"] is None) == (given["reduce_weight"] is None):
        raise ValueError("exactly one of hidden and reduce_weight must be given")
    if (given["scale"] is None) != (given["shift"] is None):
        raise ValueError("scale and shift must be given together")


def unpacked_shape(name: str, weight: Sequence[int] | None, bias: Sequence[int] | None) -> Sequence[int] | None:
    """The shape [out, in] of a weight that may be packed."""
    if weight is None or len(weight) == 2:
        return weight
    if len(weight) != 3 or weight[2] != PANEL or bias is None or weight[0] != -(-bias[0] // PANEL):
        raise ValueError(
            f"{name}_weight must be [out, in] or, with {name}_bias, packed as [ceil(out / {PANEL}), in, {PANEL}], got "
            f"{list(weight)} and {None if bias is None else list(bias)}"
        )
    return bias[0], weight[1]


def accumulable(tensor: Tensor) -> Tensor:
    """The tensor in the dtype of sums: float32 for float16 and bfloat16, else its own."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def rms_norm(hidden: Tensor, eps: float) -> Tensor:
    """hidden / sqrt(mean of hidden**2 over the channels + eps) at every position of [N, R, *O]."""
    wide = accumulable(hidden)
    return (wide * (wide.square().mean(1, keepdim=True) + eps).rsqrt()).to(hidden.dtype)


def generate(hidden: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """The span convolution: hidden [N, R, *O], weight [G * prod(K), R] -> kernel map [N, G, *K, *O]."""
    dims = len(geometry.kernel)
    flat = torch.nn.functional.linear(hidden.movedim(1, -1), weight, bias)
    in_memory = flat.unflatten(-1, (geometry.groups, *geometry.kernel))
    return in_memory.permute(logical_order("kernel_map", dims))


def scale_shift_relu(y: Tensor, parts: LayerParts) -> Tensor:
    """A fused layer's steps after the involution: scale, shift and ReLU, where present."""
    if parts.scale is not None and parts.shift is not None:
        y = y * per_channel(parts.scale, y) + per_channel(parts.shift, y)
    return y.relu() if parts.relu else y


def per_channel(vector: Tensor, image: Tensor) -> Tensor:
    """[C] -> [C, 1, ...], which broadcasts over [N, C, *S]."""
    return vector.view(-1, *[1] * (image.dim() - 2))


def average_windows(image: Tensor, stride: Sequence[int]) -> Tensor:
    """Average pooling over windows of the stride's size, clipped at the border: [N, C, *S] -> [N, C, *O].

    torch's 3d pooling rejects a window larger than the image, so windows are clipped to it.
    """
    pooling_window = [min(pair) for pair in zip(stride, image.shape[2:], strict=True)]
    return _POOL[len(stride)](image, pooling_window, tuple(stride), ceil_mode=True, count_include_pad=False)


_POOL = {1: torch.nn.functional.avg_pool1d, 2: torch.nn.functional.avg_pool2d, 3: torch.nn.functional.avg_pool3d}


def pointwise(image: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """A 1x1 convolution of [N, C, *S]; the weight may be packed."""
    assert weight is not None
    return torch.nn.functional.linear(image.movedim(1, -1), unpack(weight, bias), bias).movedim(-1, 1)
