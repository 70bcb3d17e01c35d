"""The reference backend: the maps in plain PyTorch, one shifted multiply-add per kernel tap.

It is the oracle of the tests, and serves devices without kernels. Half precision accumulates in float32. Taps outside
the input are skipped, so an Inf or NaN weight there has no effect.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..geometry import Geometry
from ..layer import LayerParts, accumulable, average_windows, generate, pointwise, rms_norm, scale_shift_relu, unpack
from ..layouts import allocate, memory_order


def apply(input: Tensor, kernel_map: Tensor, out: Tensor, geometry: Geometry) -> None:
    """y[n, c, o] = sum over u of k[n, g(c), u, o] * x[n, c, o*stride + u*dilation - padding]."""
    x, k = _grouped(input, geometry), accumulable(kernel_map)
    y = torch.zeros_like(_grouped(out, geometry), dtype=x.dtype)
    for at_map, at_output, at_input in geometry.taps():
        y[at_output].addcmul_(k[at_map].unsqueeze(2), x[at_input])
    _grouped_view(out, geometry).copy_(y)


def adjoint(grad: Tensor, kernel_map: Tensor, out: Tensor, geometry: Geometry) -> None:
    """dx, the gradient w.r.t. x: every product of `apply` is scattered back to the position of its x."""
    g, k = _grouped(grad, geometry), accumulable(kernel_map)
    dx = torch.zeros_like(_grouped(out, geometry), dtype=g.dtype)
    for at_map, at_output, at_input in geometry.taps():
        dx[at_input].addcmul_(k[at_map].unsqueeze(2), g[at_output])
    _grouped_view(out, geometry).copy_(dx)


def correlate(grad: Tensor, input: Tensor, out: Tensor, geometry: Geometry) -> None:
    """dk, the gradient w.r.t. k: for every tap and position, the dot product over the channels of a group."""
    g, x = _grouped(grad, geometry), _grouped(input, geometry)
    out.zero_()
    for at_map, at_output, at_input in geometry.taps():
        out[at_map] = (g[at_output] * x[at_input]).sum(2)


def in_steps(
    parts: LayerParts, hidden: Tensor, y: Tensor, geometry: Geometry, apply: Callable[..., None] = apply
) -> Tensor:
    """A fused layer's output from its hidden features: span convolution, involution, scale, shift and ReLU."""
    weight = unpack(parts.span_weight, parts.span_bias)
    apply(parts.input, generate(hidden, weight, parts.span_bias, geometry), y, geometry)
    return scale_shift_relu(y, parts)


def fused_layer(
    parts: LayerParts,
    outs: Sequence[Tensor],
    geometry: Geometry,
    aggregate: Callable[[LayerParts, Tensor, Tensor, Geometry], Tensor] = in_steps,
) -> None:
    """A fused layer or bottleneck, step by step; fills its output and, if present, the next block's reduced features.

    `aggregate` computes the layer's output from the hidden features, in the tensor that it gets or in a new one.
    """
    hidden = parts.hidden
    if hidden is None:
        pooled = average_windows(parts.input, geometry.stride) if max(geometry.stride) > 1 else parts.input
        hidden = pointwise(pooled, parts.reduce_weight, parts.reduce_bias)
        if parts.rms_eps > 0:
            hidden = rms_norm(hidden, parts.rms_eps)
        hidden = hidden.relu()
    y = outs[0]
    if parts.expand_weight is not None:
        y = allocate("output", (geometry.batch, geometry.channels, *geometry.output), like=parts.input)
    y = aggregate(parts, hidden, y, geometry)
    if parts.expand_weight is not None:
        y = pointwise(y, parts.expand_weight, parts.expand_bias)
        if parts.shortcut is not None:
            y = y + parts.shortcut
        if parts.expand_relu:
            y = y.relu()
    if y is not outs[0]:
        outs[0].copy_(y)
    if parts.next_reduce_weight is not None:
        outs[1].copy_(pointwise(y, parts.next_reduce_weight, parts.next_reduce_bias).relu())


def fused_layer_backward(
    grad: Tensor,
    parts: LayerParts,
    results: Sequence[Tensor],
    geometry: Geometry,
    maps: tuple[Callable[..., None], Callable[..., None]] = (adjoint, correlate),
    images: int | None = None,
) -> None:
    """Gradients of a fused layer w.r.t. input, hidden features, span weight and bias; recomputes the kernel map.

    `maps` are the adjoint and correlate to use, on `images` images at a time (None: all at once).
    """
    weight, (dx, dhidden, dweight, dbias) = parts.span_weight, results
    assert parts.hidden is not None
    order = memory_order("kernel_map", len(geometry.kernel))
    totals = [torch.zeros_like(total, dtype=accumulable(total[:0]).dtype) for total in (dweight, dbias)]
    for n in range(0, geometry.batch, images or geometry.batch):
        some = slice(n, n + (images or geometry.batch))
        hidden = parts.hidden[some]
        part = geometry._replace(batch=len(hidden))
        kernel_map = generate(hidden, weight, parts.span_bias, part)
        maps[0](grad[some], kernel_map, dx[some], part)
        maps[1](grad[some], parts.input[some], kernel_map, part)  # overwrites the map by its gradient
        flat = kernel_map.permute(order).flatten(0, len(geometry.kernel)).flatten(1)  # [N * prod(O), G * prod(K)]
        dhidden[some].copy_((flat @ weight).view(len(hidden), *geometry.output, -1).movedim(-1, 1))
        totals[0] += flat.t() @ hidden.movedim(1, -1).flatten(0, -2)
        totals[1] += flat.sum(0, dtype=totals[1].dtype)
    dweight.copy_(totals[0])
    dbias.copy_(totals[1])


def fuses(tensor: Tensor) -> bool:
    """See selection.BackendModule: never, this backend runs it in steps."""
    return False


def why_not(tensor: Tensor | None) -> str:
    """See selection.BackendModule: empty, it runs on every tensor."""
    return ""


def _grouped_view(image: Tensor, geometry: Geometry) -> Tensor:
    """[N, C, *S] -> [N, G, C/G, *S], sharing memory."""
    return image.unflatten(1, (geometry.groups, geometry.channels // geometry.groups))


def _grouped(image: Tensor, geometry: Geometry) -> Tensor:
    return _grouped_view(accumulable(image), geometry)
