"""The operators as nodes of ONNX, without custom operators: sliding-window accumulation, one slice for every tap.

Measured in onnxruntime against windows gathered row by row, per group or whole (docs/deploy.md): slices win in time and
memory. Sizes of images stay free, because slices count from both ends of an axis.
"""

from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

import torch
from onnxscript import opset18 as op

from ..ops import fused as fused  # registers the operators

Value = Any  # a tensor of the ONNX graph


def translations() -> dict[Any, Any]:
    """What torch.onnx.export takes as custom_translation_table: operator -> function that adds its nodes.

    Besides our operators for inference there is PyTorch's adaptive pooling, which UPerNet has: the exporter's own wants
    fixed sizes.
    """
    table = {"apply": apply, "correlate": correlate, "fused_layer": fused_layer}
    functions = {getattr(torch.ops.involution, name).default: add for name, add in table.items()}
    functions[torch.ops.aten._adaptive_avg_pool2d.default] = adaptive_average_pool
    # The exporter reads signatures, and lambdas have no annotations that it could misread.
    return {operator: lambda *values, add=add: add(*values) for operator, add in functions.items()}


def apply(
    input: Value,
    kernel_map: Value,
    size: Sequence[Any],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Value:
    """[N, C, *S], [N, G, *K, *O] -> [N, C, *O]."""
    dims = len(stride)
    groups, *kernel = kernel_map.shape[1 : 2 + dims]
    x = _padded(input, kernel, kernel_map, 2 + dims, stride, padding, dilation)
    weights = _reshaped(kernel_map, (0, groups, -1), 2 + dims)
    return _aggregated(x, input.shape[1], weights, groups, kernel, stride, dilation)


def fused_layer(
    input: Value,
    hidden: Value,
    span_weight: Value,
    span_bias: Value | None,
    scale: Value | None,
    shift: Value | None,
    relu: bool,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
) -> Value:
    """[N, C, *S], [N, R, *O] -> [N, C, *O]; the span is a 1x1 convolution."""
    ones = [1] * len(stride)
    span = op.Conv(hidden, op.Unsqueeze(span_weight, [-1 - axis for axis in range(len(ones))]), span_bias)
    totals = [d * (k - 1) for k, d in zip(kernel_size, dilation, strict=True)]
    lefts = [total // 2 for total in totals]
    rights = [total - left for total, left in zip(totals, lefts, strict=True)]
    x = op.Pad(input, [0, 0, *lefts, 0, 0, *rights])
    groups = span_weight.shape[0] // _count(kernel_size)
    weights = _reshaped(span, (0, groups, _count(kernel_size)), 2)
    y = _aggregated(x, input.shape[1], weights, groups, kernel_size, stride, dilation)
    if scale is not None:
        y = op.Add(op.Mul(y, op.Reshape(scale, [1, -1, *ones])), op.Reshape(shift, [1, -1, *ones]))
    return op.Relu(y) if relu else y


def correlate(
    grad: Value,
    input: Value,
    size: Sequence[Any],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Value:
    """[N, C, *O], [N, C, *S] -> [N, G, *K, *O]: the products of attention's queries and keys."""
    groups, kernel = size[1], size[2 : 2 + len(stride)]
    width = input.shape[1] // groups
    x = _reshaped(_padded(input, kernel, grad, 2, stride, padding, dilation), (0, groups, width), 2)
    query = _reshaped(grad, (0, groups, width), 2)
    products = [
        op.ReduceSum(op.Mul(query, window), [2], keepdims=True) for window in _windows(x, kernel, stride, dilation)
    ]
    return _reshaped(op.Concat(*products, axis=2), (0, groups, *kernel), 3)


def adaptive_average_pool(input: Value, output_size: Sequence[int]) -> Value:
    """[N, C, H, W] -> [N, C, *output_size], as a product with a matrix of averages for either axis."""
    rows, columns = (_averages(input, axis, cells) for axis, cells in zip((2, 3), output_size, strict=True))
    return op.MatMul(rows, op.MatMul(input, op.Transpose(columns, perm=[1, 0])))


def _averages(input: Value, axis: int, cells: int) -> Value:
    """[cells, size]: every row averages the positions from floor(cell * size / cells) to its neighbour's ceil."""
    size = op.Shape(input, start=axis, end=axis + 1)
    bounds = op.Mul(_integers(range(cells + 1)), size)
    starts = op.Unsqueeze(op.Div(op.Slice(bounds, [0], [cells]), _integers([cells])), [1])
    rounded_up = op.Add(op.Slice(bounds, [1], [cells + 1]), _integers([cells - 1]))
    ends = op.Unsqueeze(op.Div(rounded_up, _integers([cells])), [1])
    positions = op.Range(op.Constant(value_int=0), op.Squeeze(size, [0]), op.Constant(value_int=1))
    inside = op.And(op.GreaterOrEqual(positions, starts), op.Less(positions, ends))
    members = op.CastLike(inside, input)
    return op.Div(members, op.ReduceSum(members, [1], keepdims=True))


def _aggregated(
    padded: Value,
    channels: int,
    weights: Value,
    groups: int,
    kernel: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
) -> Value:
    """The sum over taps of weights [N, G, prod(K), *O] times windows of the padded image.

    Every product's node comes before the sum of those before it. onnxruntime then runs them alternately, and few are
    alive at a time; in the other order it makes all products first, 49 images for a 7x7 window.
    """
    x = _reshaped(padded, (0, groups, channels // groups), 2)
    total = last = None
    taps = op.Split(weights, axis=2, num_outputs=_count(kernel)) if _count(kernel) > 1 else [weights]
    for window, weight in zip(_windows(x, kernel, stride, dilation), taps, strict=True):
        product = op.Mul(window, weight)
        if last is not None:
            total = last if total is None else op.Add(total, last)
        last = product
    total = last if total is None else op.Add(total, last)
    return _reshaped(total, (0, channels), 3)


def _windows(x: Value, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> Iterator[Value]:
    """What every tap sees at all output positions: slices of the padded image [N, G, C/G, *S]."""
    axes = [3 + axis for axis in range(len(kernel))]
    for tap in product(*(range(extent) for extent in kernel)):
        starts = [u * d for u, d in zip(tap, dilation, strict=True)]
        after = [(extent - 1 - u) * d for u, extent, d in zip(tap, kernel, dilation, strict=True)]
        ends = [-count if count else torch.iinfo(torch.int64).max for count in after]
        yield op.Slice(x, starts, ends, axes, list(stride))


def _padded(
    image: Value,
    kernel: Sequence[int],
    output: Value,
    first_axis: int,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Value:
    """The image with zeros around it, or cut, as far as the windows reach at the positions of another tensor's axes."""
    dims = len(stride)
    reach = [d * (k - 1) + 1 - s - p for k, d, s, p in zip(kernel, dilation, stride, padding, strict=True)]
    # Right side: (O - 1) * stride + dilation * (K - 1) + 1 - padding - S.
    scaled = op.Mul(op.Shape(output, start=first_axis, end=first_axis + dims), list(stride))
    rights = op.Add(op.Sub(scaled, op.Shape(image, start=2)), reach)
    return op.Pad(image, op.Concat(_integers([0, 0, *padding, 0, 0]), rights, axis=0))


def _reshaped(tensor: Value, first: Sequence[int], rest: int) -> Value:
    """New leading axes before those from `rest` on; 0 keeps an axis, -1 is what is left."""
    return op.Reshape(tensor, op.Concat(_integers(first), op.Shape(tensor, start=rest), axis=0))


def _integers(values: Sequence[int]) -> Value:
    return op.Constant(value_ints=list(values))


def _count(kernel: Sequence[int]) -> int:
    return int(torch.Size(kernel).numel())
