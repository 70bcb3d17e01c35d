"""Counts parameters and multiply-adds by forward hooks on the meta device: nothing is computed."""

import copy
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..nn import (
    Involution1d,
    Involution2d,
    Involution3d,
    LocalSelfAttention1d,
    LocalSelfAttention2d,
    LocalSelfAttention3d,
)
from ..nn.norms import ChannelL2Norm

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_DECONVOLUTIONS = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_INVOLUTIONS = (Involution1d, Involution2d, Involution3d)
_ATTENTIONS = (LocalSelfAttention1d, LocalSelfAttention2d, LocalSelfAttention3d)
_POOLS = (nn.modules.pooling._AvgPoolNd, nn.modules.pooling._MaxPoolNd, nn.modules.pooling._AdaptiveAvgPoolNd)


class Operation(NamedTuple):
    """The cost of one call of a module, for one image.

    `multiply_adds` are those of products, without biases. `others` is what the paper's tables count in addition: one
    per output element of a convolution's bias, of a ReLU and of an upsampling, one per input element of a pooling, and
    two per input element of a batch norm or L2 norm; synchronised norms count 0.
    """

    module: str  # as named_modules() calls it
    kind: str
    parameters: int
    multiply_adds: int
    others: int


class Cost(NamedTuple):
    """A network's cost: parameters, and multiply-adds alone ("MAC") or with all other operations ("total")."""

    operations: list[Operation]
    parameters: int
    trainable: int

    @property
    def multiply_adds(self) -> int:
        """Of convolutions, linear layers, involutions and attention: the column "MAC"."""
        return sum(operation.multiply_adds for operation in self.operations)

    @property
    def total(self) -> int:
        """All operations that the paper's rules count: the column "total"."""
        return self.multiply_adds + sum(operation.others for operation in self.operations)


def parameters(model: nn.Module) -> int:
    """The number of parameters, frozen ones included."""
    return sum(parameter.numel() for parameter in model.parameters())


def multiply_adds(model: nn.Module, input_size: Sequence[int] = (3, 224, 224)) -> int:
    """Multiply-adds of one image: see :func:`cost`."""
    return cost(model, input_size).multiply_adds


@torch.no_grad()
def cost(model: nn.Module, input_size: Sequence[int] = (3, 224, 224)) -> Cost:
    """Counts a network in evaluation mode, call by call, by the rules of the paper's tables.

    In multiply-adds, a convolution costs prod(K) * C_in / groups * numel(out), a deconvolution prod(K) * numel(in) *
    C_out / groups, a linear layer numel(in) * out, an involution its generator plus prod(K) * numel(out), padding
    included; local self-attention its projections plus twice that, three times with factorised relative positions.
    Functions outside modules count 0.

    Args:
        model: takes one tensor; it is copied, not changed.
        input_size: of one image, [C, H, W].
    """
    shadow = copy.deepcopy(model).to("meta").eval()
    operations: list[Operation] = []

    def attach(name: str, module: nn.Module) -> None:
        own = sum(parameter.numel() for parameter in module.parameters(recurse=False))

        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            counted = _count(module, inputs[0], output)
            if counted is not None:
                operations.append(Operation(name, type(module).__name__, own, *counted))

        module.register_forward_hook(hook)

    for name, module in shadow.named_modules():
        attach(name, module)
    shadow(torch.empty(1, *input_size, device="meta"))
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return Cost(operations, parameters(model), trainable)


def _count(module: nn.Module, input: Tensor, output: Any) -> tuple[int, int] | None:
    """Multiply-adds and other operations of one call; None for modules without operations of their own."""
    if isinstance(module, _CONVOLUTIONS):
        return module.weight[0].numel() * output.numel(), 0 if module.bias is None else output.numel()
    if isinstance(module, _DECONVOLUTIONS):
        return module.weight[0].numel() * input.numel(), 0 if module.bias is None else output.numel()
    if isinstance(module, nn.Linear):
        return input.numel() * module.out_features, 0
    if isinstance(module, _INVOLUTIONS):
        return math.prod(module.kernel_size) * output.numel(), 0
    if isinstance(module, _ATTENTIONS):
        return _attention_products(module, output), 0
    if isinstance(module, nn.modules.batchnorm._BatchNorm | ChannelL2Norm):
        return 0, 0 if isinstance(module, nn.SyncBatchNorm) else 2 * input.numel()
    if isinstance(module, nn.ReLU | nn.Upsample):
        return 0, output.numel()
    return (0, input.numel()) if isinstance(module, _POOLS) else None


def _attention_products(module: Any, output: Tensor) -> int:
    """Query-key and weight-value products over the window and, if factorised, query-position products."""
    products = 3 if module.generator.relative_position == "factorised" else 2
    return products * math.prod(module.kernel_size) * output.numel()
