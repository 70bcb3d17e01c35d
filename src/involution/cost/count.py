"""Counting on the meta device: no weights are read and nothing is computed."""

import copy
from collections.abc import Sequence

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


def parameters(model: nn.Module) -> int:
    """How many numbers the model's parameters hold, frozen ones included."""
    return sum(parameter.numel() for parameter in model.parameters())


def multiply_adds(model: nn.Module, input_size: Sequence[int] = (3, 224, 224)) -> int:
    """Multiply-adds of one image in evaluation mode: convolutions, linears and the aggregation of involutions.

    This is the column "MAC" of the published tables: norms, activations and pooling count nothing, biases neither.

    Args:
        model: takes one tensor; it is copied, not changed.
        input_size: of one image, [C, H, W].
    """
    shadow = copy.deepcopy(model).to("meta").eval()
    image = torch.empty(1, *input_size, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        shadow(image)
    return int(counter.get_total_flops()) // 2  # torch counts a multiply-add as two
