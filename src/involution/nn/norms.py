"""Norms: the generators' L2 norm; and a norm, the sum with a shortcut and a ReLU as one operator."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.backends import cpu_norm
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
    or float64 on the CPU: it reads and writes each tensor once per pass over the rows, and saves what the norm alone
    would save. Everywhere else the modules are called.

    Args:
        input: [N, C, *S].
        norm: called with `input`.
        act: None for none.
        shortcut: [N, C, *S], or None.

    Returns:
        [N, C, *S]. Gradients of gradients are those of the modules.
    """
    if (act is None or _plain(act, nn.ReLU)) and _serves(input, shortcut):
        if _is_batch_norm(norm, input.dtype):
            return _batch_norm_relu(input, norm, act is not None, shortcut)
        if shortcut is None and _plain(norm, ChannelL2Norm):
            result: Tensor = _ChannelNorm.apply(input, norm.eps, act is not None)
            return result
    output = norm(input)
    output = output if shortcut is None else output + shortcut
    return output if act is None else act(output)


def _serves(input: Tensor, shortcut: Tensor | None) -> bool:
    """Whether the operator runs on these tensors: no tracing, no transforms, more than one value per channel."""
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined]
    if traced or not isinstance(input, Tensor) or is_transformed():
        return False
    images = (input,) if shortcut is None else (input, shortcut)
    return input.numel() > input.shape[1] and cpu_norm.serves(*images) and not torch.is_autocast_enabled("cpu")


def _plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module is of this class itself and nobody watches its calls."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return type(module) is kind and not any(getattr(module, name) for name in hooks)


def _is_batch_norm(norm: Any, dtype: torch.dtype) -> bool:
    """Whether this is torch's batch norm in training, with a scale and running statistics, all of this dtype."""
    if not _plain(norm, nn.BatchNorm2d) or not norm.training or norm.momentum is None:
        return False
    tensors = (norm.weight, norm.bias, norm.running_mean)
    return all(one is not None and one.dtype == dtype and one.is_contiguous() for one in tensors)


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
        ctx.save_for_backward(input, weight, bias, mean, variance, None if shortcut is None else output)
        ctx.eps, ctx.relu = eps, relu
        ctx.mark_non_differentiable(mean, variance)
        ctx.set_materialize_grads(False)
        return output, mean, variance

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad = grads[0]
        if grad is None:
            return (None,) * 6
        input, weight, bias, mean, variance, output = ctx.saved_tensors
        if torch.is_grad_enabled():  # under create_graph=True
            return *_differentiable_gradients(grad, input, weight, bias, output, ctx.eps, ctx.relu), None, None
        saved = input, weight, bias, (mean, variance), output
        return *cpu_norm.batch_norm_backward(_channels_last(grad), *saved, ctx.eps, ctx.relu), None, None


def _channels_last(grad: Tensor) -> Tensor:
    """The gradient, which may be expanded or contiguous, stored channels last."""
    return grad.movedim(1, -1).contiguous().movedim(-1, 1)


def _differentiable_gradients(
    grad: Tensor, input: Tensor, weight: Tensor, bias: Tensor, output: Tensor | None, eps: float, relu: bool
) -> tuple[Tensor | None, ...]:
    """The gradients of `_BatchNorm` as a graph, from torch's batch norm."""
    normed = F.batch_norm(input, None, None, weight, bias, True, 0.0, eps)
    if relu:
        grad = grad * ((normed if output is None else output).detach() > 0)
    operands = [one for one in (input, weight, bias) if one.requires_grad]
    found = iter(torch.autograd.grad(normed, operands, grad, create_graph=True))
    gradients = [next(found) if one.requires_grad else None for one in (input, weight, bias)]
    return *gradients, None if output is None else grad


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
        if torch.is_grad_enabled():  # under create_graph=True
            normed = ChannelL2Norm(ctx.eps)(input)
            grad = grad * (input.detach() > 0) if ctx.relu else grad
            return *torch.autograd.grad(normed, input, grad, create_graph=True), None, None
        grad = _channels_last(grad)
        return cpu_norm.channel_norm_backward(grad, input, ctx.eps, ctx.scale, ctx.relu), None, None
