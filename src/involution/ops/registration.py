"""The three maps as torch operators: torch.ops.involution.apply, .adjoint and .correlate.

One schema, fake, vmap rule, FLOP formula and derivative formula serves all three, because the form
T(x, k, g) = <y(x, k), g> is linear in each argument: the gradient of a map with respect to one argument is the map that
returns that argument's role, applied to the tensors of the other two roles.
"""

import math
from collections.abc import Sequence
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula  # takes 0.1 s: loads triton if installed

from . import decompositions
from .backends import selection
from .geometry import DTYPES, MAPS, Geometry, Map, geometry
from .layouts import allocate, map_is_channels_last

_ARGUMENT = {"input": "input", "kernel_map": "kernel_map", "output": "grad"}  # role -> argument name
_MAKER = {map.makes: map for map in MAPS}


def evaluate(map: Map, first: Tensor, second: Tensor, size: Sequence[int], *window: Sequence[int]) -> Tensor:
    """Runs a map under any kind of differentiation.

    torch.library's autograd registration supports neither forward mode nor torch.func (tangents would silently be
    zero), so where one of those is active an autograd.Function calls the same operators. torch.onnx.export, which
    knows only standard operators, traces those.
    """
    if torch.onnx.is_in_onnx_export():
        standard: Tensor = getattr(decompositions, map.name)(first, second, size, *window)
        return standard
    if is_transformed():
        result: Tensor = _Differentiable.apply(map, first, second, size, *window)
        return result
    return _operator(map)(first, second, size, *window)


def is_transformed() -> bool:
    """Whether a transform of torch.func or forward-mode differentiation is active."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _operator(map: Map) -> Any:
    return getattr(torch.ops.involution, map.name).default


def _gradients(
    ctx: Any, map: Map, operands: Sequence[Tensor], window: Sequence[Any], cotangent: Tensor
) -> list[Tensor | None]:
    """The gradients of <map(operands), cotangent> w.r.t. both operands; None where not needed."""
    known = {map.takes[0]: operands[0], map.takes[1]: operands[1], map.makes: cotangent}
    gradients: list[Tensor | None] = []
    for role, operand, needed in zip(map.takes, operands, ctx.needs_operand_grad, strict=True):
        maker = _MAKER[role]
        first, second = (known[taken] for taken in maker.takes)
        gradients.append(evaluate(maker, first, second, operand.shape, *window) if needed else None)
    return gradients


class _Differentiable(torch.autograd.Function):
    """A map under torch.func transforms and forward-mode differentiation."""

    @staticmethod
    def forward(map: Map, first: Tensor, second: Tensor, size: Sequence[int], *window: Sequence[int]) -> Tensor:
        result: Tensor = _operator(map)(first, second, size, *window)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.map, first, second, ctx.size, *ctx.window = inputs
        ctx.save_for_backward(first, second)
        ctx.save_for_forward(first, second)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> tuple[Any, ...]:
        if cotangents[0] is None:
            return (None,) * 7
        ctx.needs_operand_grad = ctx.needs_input_grad[1:3]
        return None, *_gradients(ctx, ctx.map, ctx.saved_tensors, ctx.window, cotangents[0]), None, None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        first, second = ctx.saved_tensors
        parts = []
        if tangents[1] is not None:
            parts.append(evaluate(ctx.map, tangents[1], second, ctx.size, *ctx.window))
        if tangents[2] is not None:
            parts.append(evaluate(ctx.map, first, tangents[2], ctx.size, *ctx.window))
        return sum(parts[1:], parts[0]) if parts else None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], map: Map, *arguments: Any) -> tuple[Tensor, int]:
        return _fold_batch(partial(evaluate, map), info, in_dims[1:], *arguments)


def _fold_batch(
    call: Any, info: Any, in_dims: tuple[Any, ...], first: Tensor, second: Tensor, size: Sequence[int], *window: Any
) -> tuple[Tensor, int]:
    """The vmap rule: folds the mapped dimension into the batch."""

    def fold(tensor: Tensor, dim: int | None) -> Tensor:
        mapped = tensor.expand(info.batch_size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
        return mapped.flatten(0, 1)

    folded_size = [info.batch_size * size[0], *size[1:]]
    result = call(fold(first, in_dims[0]), fold(second, in_dims[1]), folded_size, *window)
    return result.unflatten(0, (info.batch_size, size[0])), 0


def _run(map: Map, first: Tensor, second: Tensor, size: Sequence[int], *window: Sequence[int]) -> Tensor:
    """The operator itself: allocates the result and calls the backend that serves these tensors."""
    if first.dtype not in DTYPES or second.dtype != first.dtype or second.device != first.device:
        raise TypeError(
            f"involution::{map.name} needs two tensors of one floating dtype on one device, got {first.dtype} on "
            f"{first.device} and {second.dtype} on {second.device}"
        )
    sizes = _geometry(map, first.shape, second.shape, tuple(size), *(tuple(axes) for axes in window))
    backend = selection.backend_for(first)
    out = _fake(map, first, second, size, *window)
    if out.numel():
        getattr(backend, map.name)(first, second, out, sizes)
    return out


@lru_cache(maxsize=1024)
def _geometry(map: Map, first: Sequence[int], second: Sequence[int], size: tuple[int, ...], *window: Any) -> Geometry:
    return geometry({map.takes[0]: first, map.takes[1]: second, map.makes: size}, *window)


def _fake(map: Map, first: Tensor, second: Tensor, size: Sequence[int], *window: Sequence[int]) -> Tensor:
    """An uninitialised result, in the layout of the operand that is no gradient; of two, in the first one's.

    A gradient may have any layout (that of a sum is expanded), which must not decide the layout of a network.
    """
    if map.takes[0] == "output" and map.takes[1] == "kernel_map":
        return allocate(map.makes, size, like=first, channels_last=map_is_channels_last(second, first))
    return allocate(map.makes, size, like=second if map.takes[0] == "output" else first)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    first, second, _, *ctx.window = inputs
    ctx.save_for_backward(first, second)


def _backward(map: Map, ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
    ctx.needs_operand_grad = ctx.needs_input_grad[:2]
    return *_gradients(ctx, map, ctx.saved_tensors, ctx.window, cotangent), None, None, None, None


def _flops(map: Map, first: Sequence[int], second: Sequence[int], *_: Any, out_shape: Sequence[int], **__: Any) -> int:
    """Two per channel, output position and tap, padding included; the same for all three maps."""
    shapes = {map.takes[0]: first, map.takes[1]: second, map.makes: out_shape}
    dims = len(shapes["kernel_map"]) // 2 - 1
    return 2 * math.prod(shapes["kernel_map"][2 : 2 + dims]) * math.prod(shapes["output"])


library = torch.library.Library("involution", "DEF")
for _map in MAPS:
    _first, _second = (_ARGUMENT[role] for role in _map.takes)
    library.define(
        f"{_map.name}(Tensor {_first}, Tensor {_second}, SymInt[] size, SymInt[] stride, SymInt[] padding, "
        "SymInt[] dilation) -> Tensor",
        tags=(torch.Tag.pt2_compliant_tag,),
    )
    _name = f"involution::{_map.name}"
    library.impl(_map.name, partial(_run, _map), "CompositeExplicitAutograd")
    torch.library.register_fake(_name, partial(_fake, _map), lib=library)
    torch.library.register_autograd(_name, partial(_backward, _map), setup_context=_setup_context, lib=library)
    torch.library.register_vmap(_name, partial(_fold_batch, _operator(_map)), lib=library)
    register_flop_formula(getattr(torch.ops.involution, _map.name))(partial(_flops, _map))
