"""The operators composed of torch's standard ones, for runtimes that have no others.

apply and correlate are a product with a strided view of all windows, and a sum: ten nodes to trace and to compile
instead of two hundred, and compilers fuse them. Exported programs consist of them (`involution.export.decompositions`),
and so does what torch.onnx.export traces. torch's own table of decompositions has no entry for our operators: every
FakeTensor would run it, and if the environment variable CI is set, Inductor refuses such operators.

All trace with symbolic sizes. Padding is zeros that are multiplied, so a weight outside the image must be finite; the
kernels skip it instead.
"""

from collections.abc import Sequence
from itertools import product
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from .arguments import same_padding
from .geometry import Index
from .layer import LayerParts, accumulable, average_windows, rms_norm, scale_shift_relu, unpack
from .layouts import in_layout, is_channels_last, map_is_channels_last

_CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def apply(
    input: Tensor,
    kernel_map: Tensor,
    size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """y[n, c, o] = sum over u of k[n, g(c), u, o] * x[n, c, o*stride + u*dilation - padding]."""
    sides = _sides(input.shape[2:], size[2:], kernel_map.shape[2 : 2 + len(stride)], stride, padding, dilation)
    return _aggregate(input, kernel_map, sides, stride, dilation)


def adjoint(
    grad: Tensor,
    kernel_map: Tensor,
    size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """dx, the gradient of `apply` with respect to its input."""
    kernel = kernel_map.shape[2 : 2 + len(stride)]
    g, k = accumulable(grad).unflatten(1, (kernel_map.shape[1], -1)), accumulable(kernel_map)
    dx: Any = None
    for tap in product(*(range(extent) for extent in kernel)):
        of_tap: Index = (slice(None), slice(None), *tap)
        spread = _spread(g * k[of_tap].unsqueeze(2), stride)
        before_and_after = [(u * d, (extent - 1 - u) * d) for u, extent, d in zip(tap, kernel, dilation, strict=True)]
        shifted = _pad(spread, before_and_after)
        dx = shifted if dx is None else dx + shifted
    dx = dx.flatten(1, 2)
    cut = [(-p, full + p - have) for p, full, have in zip(padding, size[2:], dx.shape[2:], strict=True)]
    return in_layout(map_is_channels_last(kernel_map, grad), "input", _pad(dx, cut).to(grad.dtype))


def correlate(
    grad: Tensor,
    input: Tensor,
    size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """dk[n, g, u, o] = sum over c in group g of grad[n, c, o] * x[n, c, o*stride + u*dilation - padding]."""
    dims = len(stride)
    kernel = size[2 : 2 + dims]
    x = _pad(accumulable(input), _sides(input.shape[2:], grad.shape[2:], kernel, stride, padding, dilation))
    windows = _windows(x.unflatten(1, (size[1], -1)), kernel, stride, dilation)
    g = accumulable(grad).unflatten(1, (size[1], -1))
    dots = (windows * g[(..., *[None] * dims)]).sum(2)  # [N, G, *O, *K]
    dk = dots.movedim(tuple(range(-dims, 0)), tuple(range(2, 2 + dims)))
    return in_layout(is_channels_last(input), "kernel_map", dk.to(grad.dtype))


def fused_layer(
    input: Tensor,
    hidden: Tensor,
    span_weight: Tensor,
    span_bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    relu: bool,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """The span convolution, the involution with its kernels, and the norm and ReLU after it."""
    parts = LayerParts(input, hidden, None, None, span_weight, span_bias, scale, shift, relu=relu)
    return _layer(parts, hidden, kernel_size, stride, dilation)


def fused_bottleneck(
    input: Tensor,
    reduce_weight: Tensor,
    reduce_bias: Tensor | None,
    rms_eps: float,
    span_weight: Tensor,
    span_bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    relu: bool,
    expand_weight: Tensor | None,
    expand_bias: Tensor | None,
    shortcut: Tensor | None,
    expand_relu: bool,
    next_reduce_weight: Tensor | None,
    next_reduce_bias: Tensor | None,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
) -> list[Tensor]:
    """The fused layer from its reduction on, with the expansion, the shortcut and the next reduction where given."""
    parts = LayerParts(input, None, reduce_weight, reduce_bias, span_weight, span_bias, scale, shift, relu=relu)
    hidden = _pointwise(average_windows(input, stride) if max(stride) > 1 else input, reduce_weight, reduce_bias)
    if rms_eps > 0:
        hidden = rms_norm(hidden, rms_eps)
    y = _layer(parts, hidden.relu(), kernel_size, stride, dilation)
    if expand_weight is not None:
        y = _pointwise(y, expand_weight, expand_bias)
        y = y if shortcut is None else y + shortcut
        y = y.relu() if expand_relu else y
    if next_reduce_weight is None:
        return [y]
    return [y, _pointwise(y, next_reduce_weight, next_reduce_bias).relu()]


def _layer(
    parts: LayerParts,
    hidden: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    kernel_map = _pointwise(hidden, parts.span_weight, parts.span_bias).unflatten(1, (-1, *kernel_size))
    y = _aggregate(parts.input, kernel_map, same_padding(kernel_size, dilation), stride, dilation)
    return scale_shift_relu(y, parts)


def _aggregate(
    input: Tensor,
    kernel_map: Tensor,
    sides: Sequence[tuple[int, int]],
    stride: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """The sum over the last axes of all windows, a view of the padded image, times their weights."""
    dims = len(stride)
    x = _pad(accumulable(input), sides).unflatten(1, (kernel_map.shape[1], -1))
    windows = _windows(x, kernel_map.shape[2 : 2 + dims], stride, dilation)
    weights = accumulable(kernel_map).movedim(tuple(range(2, 2 + dims)), tuple(range(-dims, 0))).unsqueeze(2)
    y = (windows * weights).sum(tuple(range(-dims, 0)))
    return in_layout(is_channels_last(input), "output", y.flatten(1, 2).to(input.dtype))


def _pointwise(image: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A 1x1 convolution of [N, C, *S]; the weight [out, in] may be packed."""
    weight = unpack(weight, bias)
    return _CONVOLVE[image.dim() - 2](image, weight.view(*weight.shape, *[1] * (image.dim() - 2)), bias)


def _windows(x: Tensor, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> Tensor:
    """All windows of a padded image [N, G, C/G, *S], without a copy: [N, G, C/G, *O, *K]."""
    for axis, (extent, step, d) in enumerate(zip(kernel, stride, dilation, strict=True), start=3):
        x = x.unfold(axis, (extent - 1) * d + 1, step)[..., ::d]
    return x


def _sides(
    input: Sequence[int],
    output: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> list[tuple[int, int]]:
    """The padding of every axis that the windows of all output positions need; a negative one cuts."""
    sides = []
    for size, positions, extent, step, left, d in zip(input, output, kernel, stride, padding, dilation, strict=True):
        reach = (positions - 1) * step + (extent - 1) * d + 1
        sides.append((left, reach - left - size))
    return sides


def _pad(image: Tensor, sides: Sequence[tuple[int, int]]) -> Tensor:
    """Adds zeros before and after each of the last axes; negative numbers cut."""
    return F.pad(image, [side for pair in reversed(sides) for side in pair])


def _spread(image: Tensor, stride: Sequence[int]) -> Tensor:
    """Inserts stride - 1 zeros between neighbouring positions of every axis: O -> (O - 1) * stride + 1."""
    for axis, step in enumerate(stride, start=-len(stride)):
        if step > 1:
            image = F.pad(image.movedim(axis, -1).unsqueeze(-1), (0, step - 1)).flatten(-2)
            image = F.pad(image, (0, 1 - step)).movedim(-1, axis)
    return image
