"""Batch norm and channel norm in training, with the ReLU behind them: the C++ kernels of csrc/norm.cpp.

Tensors are [N, C, *S], float32 or float64, on the CPU, stored as [N, *S, C] (`serves` checks this).
"""

from typing import Any

import torch
from torch import Tensor

from ..layouts import is_stored_channels_last
from . import selection
from .cpu_library import SUFFIX, CBatchNorm, CChannelNorm, function, library


def serves(*tensors: Tensor) -> bool:
    """Whether the kernels run on these images: one dtype and shape, channels last, not empty, nothing that traces."""
    first = tensors[0]
    return (
        selection.forced in (None, "cpu")
        and first.dtype in (torch.float32, torch.float64)
        and first.numel() > 0
        and library() is not None
        and all(
            type(one) is Tensor
            and one.device.type == "cpu"
            and one.dtype == first.dtype
            and one.shape == first.shape
            and is_stored_channels_last(one)
            and not one.is_neg()
            for one in tensors
        )
    )


def batch_norm(
    input: Tensor, weight: Tensor, bias: Tensor, shortcut: Tensor | None, eps: float, relu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalises with the batch's statistics, adds the shortcut, and rectifies.

    Args:
        input: [N, C, *S].
        weight: [C].
        bias: [C].
        shortcut: like `input`, or None.
        eps: added to the variance.
        relu: whether a ReLU follows.

    Returns:
        The output, like `input`; mean and biased variance of the batch, [C].
    """
    output = torch.empty_like(input)
    mean, variance = (input.new_empty(input.shape[1]) for _ in range(2))
    _batch_norm(
        "involution_batch_norm",
        *(input, eps, relu),
        {"x": input, "weight": weight, "bias": bias, "shortcut": shortcut, "y": output, "mean": mean}
        | {"variance": variance},
    )
    return output, mean, variance


def batch_norm_backward(
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    statistics: tuple[Tensor, Tensor],
    output: Tensor | None,
    eps: float,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The gradients of `batch_norm`.

    Args:
        grad: of the output, stored as the input is.
        input: [N, C, *S].
        weight: [C].
        bias: [C]; needed for a ReLU without a shortcut.
        statistics: mean and variance, as `batch_norm` returned them.
        output: of `batch_norm`; needed for a ReLU with a shortcut.
        eps: as in `batch_norm`.
        relu: as in `batch_norm`.

    Returns:
        The gradients of input, weight, bias, and of the shortcut (None without `output`).
    """
    dx, dweight, dbias = torch.empty_like(input), torch.empty_like(weight), torch.empty_like(weight)
    dshortcut = None if output is None else torch.empty_like(input)
    mean, variance = statistics
    _batch_norm(
        "involution_batch_norm_backward",
        *(input, eps, relu),
        {"x": input, "weight": weight, "bias": bias, "dy": grad, "y": output, "mean": mean, "variance": variance}
        | {"dx": dx, "dweight": dweight, "dbias": dbias, "dshortcut": dshortcut},
    )
    return dx, dweight, dbias, dshortcut


def _batch_norm(name: str, input: Tensor, eps: float, relu: bool, tensors: dict[str, Tensor | None]) -> None:
    call = CBatchNorm(
        **_sizes(input),
        relu=relu,
        eps=eps,
        **{field: None if tensor is None else tensor.data_ptr() for field, tensor in tensors.items()},
    )
    workspace = torch.empty(function("involution_batch_norm_workspace")(call), dtype=torch.float64, device="cpu")
    call.workspace = workspace.data_ptr()
    function(f"{name}_{SUFFIX[input.dtype]}")(call)


def channel_norm(input: Tensor, eps: float, scale: float, relu: bool) -> Tensor:
    """scale * x / sqrt(mean of x**2 over the channels + eps), then a ReLU if `relu`: [N, C, *S] -> [N, C, *S]."""
    output = torch.empty_like(input)
    _channel_norm("involution_channel_norm", input, eps, scale, relu, y=output)
    return output


def channel_norm_backward(grad: Tensor, input: Tensor, eps: float, scale: float, relu: bool) -> Tensor:
    """The gradient of `channel_norm`'s input; `grad` is stored as the input is."""
    dx = torch.empty_like(input)
    _channel_norm("involution_channel_norm_backward", input, eps, scale, relu, dy=grad, dx=dx)
    return dx


def _channel_norm(name: str, input: Tensor, eps: float, scale: float, relu: bool, **tensors: Tensor) -> None:
    pointers = {field: tensor.data_ptr() for field, tensor in tensors.items()}
    call = CChannelNorm(**_sizes(input), relu=relu, eps=eps, scale=scale, x=input.data_ptr(), **pointers)
    function(f"{name}_{SUFFIX[input.dtype]}")(call)


def _sizes(input: Tensor) -> dict[str, Any]:
    channels = input.shape[1]
    return {"rows": input.numel() // channels, "channels": channels, "threads": torch.get_num_threads()}
