"""Last layers of heads that compute in float32, whatever the network's dtype and autocast.

bfloat16 has eight bits of precision: hundreds of logits would be equal, and the order of equal scores is arbitrary.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Conv2d(nn.Conv2d):
    """torch's Conv2d with a float32 output for an input of any dtype."""

    def forward(self, input: Tensor) -> Tensor:
        """[N, in_channels, H, W] -> [N, out_channels, h, w] float32."""
        with _without_autocast(input.device.type):
            return self._conv_forward(input.float(), self.weight.float(), _float(self.bias))


class Linear(nn.Linear):
    """torch's Linear with a float32 output for an input of any dtype."""

    def forward(self, input: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features] float32."""
        with _without_autocast(input.device.type):
            return F.linear(input.float(), self.weight.float(), _float(self.bias))


def _without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Disables autocast, which the meta device (`involution cost`) does not have."""
    known = torch.amp.is_autocast_available(device_type)
    return torch.autocast(device_type, enabled=False) if known else nullcontext()


def _float(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.float()


def in_float32(module: nn.Module, *names: str) -> None:
    """Replaces convolutions of a module, given by name, by `Conv2d`s with the same parameters."""
    for name in names:
        layer = module.get_submodule(name)
        assert isinstance(layer, nn.Conv2d)
        sizes: Any = {size: getattr(layer, size) for size in ("kernel_size", "stride", "padding")}
        replacement = Conv2d(layer.in_channels, layer.out_channels, bias=layer.bias is not None, **sizes)
        replacement.weight, replacement.bias = layer.weight, layer.bias
        setattr(module, name, replacement)
