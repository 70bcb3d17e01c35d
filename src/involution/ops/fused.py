"""The fused layer as torch operators: the kernels of a patch of positions are generated, applied and discarded.

Span is the 1x1 convolution that produces the kernels, reduce the one before it, expand and next_reduce those after the
involution (layer.py). The kernel map [N, G, *K, *O] is prod(K) / group_channels times the size of the output; it is
stored only for gradients that are themselves differentiated (create_graph=True), under functorch's transforms and
in forward mode. Three operators:

    fused_layer             span convolution and involution, from the hidden features on; differentiable
    fused_layer_backward    its gradients, which recompute the kernel map in parts
    fused_bottleneck        inference only: with the reduction before it, the expansion (1x1 convolution) and shortcut
                            after it, and the next block's reduction
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import decompositions
from .arguments import Ints, per_axis
from .backends import selection
from .geometry import MAPS
from .layer import (
    LayerParts,
    checked_geometry,
    generate,
    layer_geometry,
    layer_output,
    per_channel,
    scale_shift_relu,
    unpacked_shape,
)
from .layouts import allocate
from .registration import evaluate, is_transformed, library

_APPLY, _ADJOINT, _CORRELATE = MAPS


def fused_layer(
    input: Tensor,
    hidden: Tensor,
    span_weight: Tensor,
    span_bias: Tensor | None,
    kernel_size: Ints,
    stride: Ints = 1,
    dilation: Ints = 1,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    """The generator's span convolution and the involution with its kernels, without storing the kernel map.

    ``y = involution(input, hidden @ span_weight.T + span_bias)``, then optionally ``scale * y + shift`` and ReLU. Sizes
    are those of `Involution2d`: O = ceil(S / stride), padded by ``floor(dilation * (K - 1) / 2)`` on the left.

    Args:
        input: ``[N, C, *S]``.
        hidden: ``[N, R, *O]``, the input of the span convolution.
        span_weight: [G * prod(K), R], group-major, then kernel positions.
        span_bias: [G * prod(K)] or None.
        kernel_size: K, an int or one per axis, as `stride` and `dilation`.
        stride: of the involution.
        dilation: of the involution.
        scale: [C] or None; with `shift`, a folded norm.
        shift: [C], exactly if there is a scale.
        relu: apply ReLU last.

    Returns:
        ``[N, C, *O]`` in the input's dtype and layout. Backward saves the arguments, with `relu` also the output, and
        recomputes the kernel map in parts. Gradients of any order; those of gradients store the kernel map.

    Raises:
        TypeError: dtypes differ, or are not float16, bfloat16, float32 or float64.
        ValueError: shapes do not fit each other.
    """
    tensors: list[Any] = [input, hidden, span_weight, span_bias, scale, shift]
    device = input.device.type
    if device != "meta" and torch.is_autocast_enabled(device) and input.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        tensors = [None if t is None else t.to(dtype) for t in tensors]
    if not 3 <= input.dim() <= 5:
        raise ValueError(f"input must be [N, C, *S] with one to three spatial axes, got {list(input.shape)}")
    named = (("kernel_size", kernel_size), ("stride", stride), ("dilation", dilation))
    geometry_arguments = tuple(list(per_axis(name, value, input.dim() - 2, 1)) for name, value in named)
    if is_transformed():
        return _unfused(_layer_parts(*tensors, relu), geometry_arguments)  # its steps support every one
    arguments: list[Any] = [*tensors, relu, *geometry_arguments]
    if torch.onnx.is_in_onnx_export():
        return decompositions.fused_layer(*arguments)  # see `evaluate`
    result: Tensor = torch.ops.involution.fused_layer.default(*arguments)
    return result


def _unfused(parts: LayerParts, geometry_arguments: Sequence[Sequence[int]]) -> Tensor:
    """`fused_layer` composed of differentiable steps."""
    sizes = layer_geometry(parts.input.shape, parts.span_weight.shape[0], *geometry_arguments)
    assert parts.hidden is not None
    kernel_map = generate(parts.hidden, parts.span_weight, parts.span_bias, sizes)
    size = [*parts.input.shape[:2], *sizes.output]
    return scale_shift_relu(
        evaluate(_APPLY, parts.input, kernel_map, size, sizes.stride, sizes.padding, sizes.dilation), parts
    )


def _run(parts: LayerParts, geometry_arguments: Sequence[Sequence[int]]) -> list[Tensor]:
    sizes = checked_geometry(parts, geometry_arguments)
    outs = [allocate("output", size, like=parts.input) for size in parts.output_sizes(sizes.output)]
    if outs[0].numel():
        selection.backend_for(parts.input).fused_layer(parts, outs, sizes)
    return outs


def _fake(parts: LayerParts, geometry_arguments: Sequence[Sequence[int]]) -> list[Tensor]:
    output_size = layer_output(parts.input.shape[2:], geometry_arguments[1])
    return [allocate("output", size, like=parts.input) for size in parts.output_sizes(output_size)]


# The operators' arguments between the input and the geometry arguments (kernel_size, stride, dilation), in order.
_LAYER = ("hidden", "span_weight", "span_bias", "scale", "shift", "relu")
_BOTTLENECK = (
    *("reduce_weight", "reduce_bias", "rms_eps", "span_weight", "span_bias", "scale", "shift", "relu"),
    *("expand_weight", "expand_bias", "shortcut", "expand_relu", "next_reduce_weight", "next_reduce_bias"),
)
_ABSENT: dict[str, Any] = dict.fromkeys(("hidden", "reduce_weight", "reduce_bias"))


def _layer_parts(input: Tensor, *arguments: Any) -> LayerParts:
    parts = LayerParts(input, **(_ABSENT | dict(zip(_LAYER, arguments, strict=True))))
    if parts.span_weight.dim() != 2:
        raise ValueError(f"span_weight must be [G * prod(K), R], got {list(parts.span_weight.shape)}")
    return parts


def _bottleneck_parts(input: Tensor, *arguments: Any) -> LayerParts:
    return LayerParts(input, **(_ABSENT | dict(zip(_BOTTLENECK, arguments, strict=True))))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.relu, kernel_size, stride, dilation = inputs
    ctx.geometry_arguments = kernel_size, stride, dilation
    ctx.save_for_backward(*tensors, output if ctx.relu else None)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    input, hidden, weight, bias, scale, _, output = ctx.saved_tensors
    if ctx.relu:
        grad = torch.ops.aten.threshold_backward(grad, output, 0)
    dscale = dshift = None
    if scale is not None:
        reduce_axes = (0, *range(2, grad.dim()))
        unscaled = torch.ops.involution.fused_layer.default(
            input, hidden, weight, bias, None, None, False, *ctx.geometry_arguments
        )
        dscale, dshift = (grad * unscaled).sum(reduce_axes), grad.sum(reduce_axes)
        grad = grad * per_channel(scale, grad)
    if torch.is_grad_enabled():  # create_graph=True: the gradients are composed of differentiable steps
        sizes = layer_geometry(input.shape, weight.shape[0], *ctx.geometry_arguments)
        kernel_map = generate(hidden, weight, bias, sizes)
        steps = sizes.stride, sizes.padding, sizes.dilation
        dx = evaluate(_ADJOINT, grad, kernel_map, input.shape, *steps)
        dmap = evaluate(_CORRELATE, grad, input, kernel_map.shape, *steps)
        flat = dmap.flatten(1, 1 + len(sizes.kernel)).flatten(2)  # [N, G * prod(K), prod(O)]
        dhidden = torch.einsum("nmo,mr->nro", flat, weight).view_as(hidden)
        dweight, dbias = torch.einsum("nmo,nro->mr", flat, hidden.flatten(2)), flat.sum((0, 2))
    else:
        dx, dhidden, dweight, dbias = torch.ops.involution.fused_layer_backward.default(
            grad, input, hidden, weight, bias, *ctx.geometry_arguments
        )
    return dx, dhidden, dweight, None if bias is None else dbias, dscale, dshift, None, None, None, None


def _run_backward(
    grad: Tensor, input: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, *geometry_arguments: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    parts = LayerParts(input, hidden, None, None, weight, bias)
    sizes = checked_geometry(parts, geometry_arguments)
    if grad.shape != (*input.shape[:2], *sizes.output) or grad.dtype != input.dtype or grad.device != input.device:
        raise ValueError(
            f"grad must be {[*input.shape[:2], *sizes.output]} in {input.dtype} on {input.device}, got "
            f"{list(grad.shape)} in {grad.dtype} on {grad.device}"
        )
    results = _fake_backward(grad, input, hidden, weight, bias, *geometry_arguments)
    if grad.numel():
        selection.backend_for(input).fused_layer_backward(grad, parts, results, sizes)
    else:
        for result in results:
            result.zero_()
    return results


def _fake_backward(
    grad: Tensor, input: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, *_: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dx, dhidden = allocate("input", input.shape, like=input), allocate("input", hidden.shape, like=input)
    return dx, dhidden, weight.new_empty(weight.shape), weight.new_empty(weight.shape[0])


def _flops(
    input: Sequence[int],
    pointwise: Sequence[Sequence[int] | None],
    geometry_arguments: Sequence[Any],
    convolved: int = 1,
    involutions: int = 1,
) -> int:
    """Two per multiply-add: of `involutions` maps, and of 1x1 convolutions [out, in], of which the span is the first.

    The convolutions count `convolved` times.
    """
    weights = [weight for weight in pointwise if weight is not None]
    sizes = layer_geometry(input, weights[0][0], *geometry_arguments)
    convolutions = sum(math.prod(weight) for weight in weights)
    each = involutions * math.prod(sizes.kernel) * sizes.channels + convolved * convolutions
    return 2 * sizes.batch * math.prod(sizes.output) * each


_GEOMETRY = "SymInt[] kernel_size, SymInt[] stride, SymInt[] dilation"
_SCHEMAS = (
    "fused_layer(Tensor input, Tensor hidden, Tensor span_weight, Tensor? span_bias, Tensor? scale, Tensor? shift, "
    f"bool relu, {_GEOMETRY}) -> Tensor",
    "fused_layer_backward(Tensor grad, Tensor input, Tensor hidden, Tensor span_weight, Tensor? span_bias, "
    f"{_GEOMETRY}) -> (Tensor, Tensor, Tensor, Tensor)",
    "fused_bottleneck(Tensor input, Tensor reduce_weight, Tensor? reduce_bias, float rms_eps, Tensor span_weight, "
    "Tensor? span_bias, Tensor? scale, Tensor? shift, bool relu, Tensor? expand_weight, Tensor? expand_bias, "
    "Tensor? shortcut, bool expand_relu, Tensor? next_reduce_weight, Tensor? next_reduce_bias, "
    f"{_GEOMETRY}) -> Tensor[]",
)
# The last three arguments of every operator are kernel_size, stride and dilation.
for _schema in _SCHEMAS:
    library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))
library.impl("fused_layer", lambda *a: _run(_layer_parts(*a[:-3]), a[-3:])[0], "CompositeExplicitAutograd")
library.impl("fused_layer_backward", _run_backward, "CompositeExplicitAutograd")
library.impl("fused_bottleneck", lambda *a: _run(_bottleneck_parts(*a[:-3]), a[-3:]), "CompositeExplicitAutograd")
torch.library.register_fake("involution::fused_layer", lambda *a: _fake(_layer_parts(*a[:-3]), a[-3:])[0], lib=library)
torch.library.register_fake("involution::fused_layer_backward", _fake_backward, lib=library)
torch.library.register_fake(
    "involution::fused_bottleneck", lambda *a: _fake(_bottleneck_parts(*a[:-3]), a[-3:]), lib=library
)
torch.library.register_autograd("involution::fused_layer", _backward, setup_context=_setup_context, lib=library)


@register_flop_formula(torch.ops.involution.fused_layer)
def _fused_flops(x: Any, h: Any, weight: Any, *rest: Any, out_shape: Any = None, **_: Any) -> int:
    return _flops(x, [weight], rest[-3:])


@register_flop_formula(torch.ops.involution.fused_layer_backward)
def _backward_flops(g: Any, x: Any, h: Any, weight: Any, *rest: Any, out_shape: Any = None, **_: Any) -> int:
    # The span's product three times: the recomputed kernel map, dhidden and dweight. Two maps: adjoint and correlate.
    return _flops(x, [weight], rest[-3:], convolved=3, involutions=2)


@register_flop_formula(torch.ops.involution.fused_bottleneck)
def _bottleneck_flops(x: Any, *rest: Any, out_shape: Any = None, **_: Any) -> int:
    parts = dict(zip(_BOTTLENECK, rest, strict=False))
    names = ("span", "reduce", "expand", "next_reduce")
    return _flops(
        x, [unpacked_shape(name, parts[f"{name}_weight"], parts[f"{name}_bias"]) for name in names], rest[-3:]
    )
