"""Norms: the generators' L2 norm; and a norm, the sum with a shortcut and a ReLU as one operator."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

from ..ops.backends import cpu_norm
from ..ops.layouts import in_layout
from ..ops.registration import is_transformed


class ChannelL2Norm(nn.Module):
    """L2 norm over the channels of each position, without parameters: features of unit length, whatever their scale.

    Positions are independent: no batch statistics, no running statistics. float16 and bfloat16 compute the mean square
    in float32. Where the RMS is not well above sqrt(eps), the result tends to 0.

    Args:
        eps: added to the mean square.

    Shapes: ``[N, C, *S] -> [N, C, *S]``.
    """

    def __init__(self, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, input: Tensor) -> Tensor:
        """x / sqrt(C * (mean of x**2 over the channels + eps))."""
        last = input.movedim(1, -1)
        channels = last.shape[-1]
        return (F.rms_norm(last, (channels,), eps=self.eps) * channels**-0.5).movedim(-1, 1)


def norm_act(input: Tensor, norm: nn.Module, act: nn.Module | None = None, shortcut: Tensor | None = None) -> Tensor:
    """act(norm(input) + shortcut).

    nn.BatchNorm2d in training and `ChannelL2Norm` are one operator with an nn.ReLU for channels-last images of float32
    or float64 on the CPU: it reads and writes each tensor once per pass over the rows, and saves what norm and ReLU
    save. Everywhere else the modules are called.

    Args:
        input: [N, C, *S].
        norm: called with `input`.
        act: None for none.
        shortcut: [N, C, *S], or None.

    Returns:
        [N, C, *S]. Gradients of gradients are those of the modules.
    """
    if act is None or _plain(act, nn.ReLU):
        if _is_batch_norm(norm) and _serves(input, shortcut) and _fits(norm, input):
            return _batch_norm_relu(input, norm, act is not None, shortcut)
        if shortcut is None and _plain(norm, ChannelL2Norm) and _serves(input, None):
            result: Tensor = _ChannelNorm.apply(input, norm.eps, act is not None)
            return result
    output = norm(input)
    output = output if shortcut is None else output + shortcut
    return output if act is None else act(output)


def _serves(input: Tensor, shortcut: Tensor | None) -> bool:
    """Whether the operator runs on these tensors: no tracing, no transforms, more than one value per channel."""
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined]
    if traced or _get_current_dispatch_mode() is not None or not isinstance(input, Tensor) or is_transformed():
        return False
    if input.dim() < 3 or input.numel() <= input.shape[1] or torch.is_autocast_enabled("cpu"):
        return False
    return cpu_norm.serves(*((input,) if shortcut is None else (input, shortcut)))


def _plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module is of this class itself, with its forward, and has no hooks."""
    if type(module) is not kind or "forward" in vars(module):
        return False
    return not has_hooks(module) and not nn.modules.module._has_any_global_hook()


def has_hooks(module: nn.Module) -> bool:
    """Whether hooks are registered with this module, which want its call."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, kind) for kind in kinds)


def _is_batch_norm(norm: Any) -> bool:
    """Whether this is torch's batch norm in training, with running statistics."""
    return _plain(norm, nn.BatchNorm2d) and norm.training and norm.momentum is not None and norm.track_running_stats


def _fits(norm: Any, input: Tensor) -> bool:
    """Whether a batch norm has parameters and statistics that fit the input."""
    return input.dim() == 4 and all(
        type(one) in (Tensor, nn.Parameter)
        and one.shape == input.shape[1:2]
        and (one.dtype, one.device) == (input.dtype, input.device)
        and one.is_contiguous()
        for one in (norm.weight, norm.bias, norm.running_mean, norm.running_var)
    )


def _batch_norm_relu(input: Tensor, norm: Any, relu: bool, shortcut: Tensor | None) -> Tensor:
    output, mean, variance = _BatchNorm.apply(input, norm.weight, norm.bias, shortcut, norm.eps, relu)
    count = input.numel() // input.shape[1]
    with torch.no_grad():
        norm.num_batches_tracked.add_(1)
        norm.running_mean.lerp_(mean, norm.momentum)
        norm.running_var.lerp_(variance * (count / (count - 1)), norm.momentum)
    result: Tensor = output
    return result


class _BatchNorm(torch.autograd.Function):
    """The kernels of csrc/norm.cpp with their gradients."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor, bias: Tensor, shortcut: Tensor | None, eps: float, relu: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        output, mean, variance = cpu_norm.batch_norm(input, weight, bias, shortcut, eps, relu)
        ctx.with_shortcut = shortcut is not None
        # The sign of the output, for the ReLU, is computed again where no shortcut was added.
        of_relu = (None, None) if not relu else (None, output) if ctx.with_shortcut else (bias, None)
        ctx.save_for_backward(input, weight, mean, variance, *of_relu)
        ctx.eps, ctx.relu = eps, relu
        ctx.mark_non_differentiable(mean, variance)
        ctx.set_materialize_grads(False)
        return output, mean, variance

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad = grads[0]
        if grad is None:
            return (None,) * 6
        input, weight, mean, variance, bias, output = ctx.saved_tensors
        if _is_watched(grad):
            operands = input, weight, torch.zeros_like(weight) if bias is None else bias
            found = _composed_gradients(grad, partial(_batch_norm_of, ctx.eps), operands, ctx.relu, output)
            return *found[:3], found[3] if ctx.with_shortcut else None, None, None
        grad = _channels_last(grad)
        dx, dweight, dbias, dshortcut = cpu_norm.batch_norm_backward(
            grad, input, weight, bias, (mean, variance), output, ctx.eps, ctx.relu
        )
        if ctx.with_shortcut and not ctx.relu:
            dshortcut = grad
        return dx, dweight, dbias, dshortcut, None, None


def _batch_norm_of(eps: float, input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.batch_norm(input, None, None, weight, bias, True, 0.0, eps)


class _ChannelNorm(torch.autograd.Function):
    """`ChannelL2Norm` and a ReLU, and their gradient."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, eps: float, relu: bool) -> Tensor:
        ctx.save_for_backward(input)
        ctx.eps, ctx.relu, ctx.scale = eps, relu, input.shape[1] ** -0.5
        return cpu_norm.channel_norm(input, eps, ctx.scale, relu)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        [input], [grad] = ctx.saved_tensors, grads
        if _is_watched(grad):
            dx, _ = _composed_gradients(grad, ChannelL2Norm(ctx.eps), (input,), ctx.relu)
            return dx, None, None
        return cpu_norm.channel_norm_backward(_channels_last(grad), input, ctx.eps, ctx.scale, ctx.relu), None, None


def _is_watched(grad: Tensor) -> bool:
    """Whether the backward pass is differentiated (create_graph=True, forward mode) or batched (is_grads_batched)."""
    return torch.is_grad_enabled() or is_transformed() or torch._C._functorch.is_legacy_batchedtensor(grad)


def _channels_last(grad: Tensor) -> Tensor:
    """The gradient, which may be expanded, contiguous or negated on reading, stored channels last."""
    return in_layout(True, "output", grad.resolve_neg())


def _composed_gradients(
    grad: Tensor, norm: Callable[..., Tensor], operands: Sequence[Tensor], relu: bool, output: Tensor | None = None
) -> tuple[Tensor, ...]:
    """The gradients of a norm's operands by autograd, and the gradient before the ReLU, which is a shortcut's.

    Operands are aliases, so that a gradient does not flow on into what the operands were computed from.

    Args:
        grad: of the output.
        norm: of the operands, in torch's own operators.
        operands: the input first.
        relu: whether a ReLU follows.
        output: of the ReLU; None if it is relu(norm(operands)).
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        aliases = [one.view_as(one) if one.requires_grad else one.detach().requires_grad_() for one in operands]
        normed = norm(*aliases)
        if relu:
            grad = grad * ((normed if output is None else output).detach() > 0)
        return *torch.autograd.grad(normed, aliases, grad, create_graph=create_graph), grad
