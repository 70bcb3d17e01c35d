"""The last layers of heads, which compute in float32 whatever the network's dtype and autocast.

Of logits in bfloat16, which has eight bits, hundreds are equal, and what is found first among equal scores is chance.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Conv2d(nn.Conv2d):
    """torch's: [N, C, H, W] of any dtype -> float32."""

    def forward(self, input: Tensor) -> Tensor:
        """[N, in_channels, H, W] -> [N, out_channels, h, w] float32."""
        with _without_autocast(input.device.type):
            return self._conv_forward(input.float(), self.weight.float(), _float(self.bias))


class Linear(nn.Linear):
    """torch's: [..., C] of any dtype -> float32."""

    def forward(self, input: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features] float32."""
        with _without_autocast(input.device.type):
            return F.linear(input.float(), self.weight.float(), _float(self.bias))


def _without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """The meta device, on which costs are counted, knows no autocast."""
    known = torch.amp.is_autocast_available(device_type)
    return torch.autocast(device_type, enabled=False) if known else nullcontext()


def _float(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.float()


def in_float32(module: nn.Module, *names: str) -> None:
    """Exchanges convolutions of a module, by name, for such that compute in float32 with the same parameters."""
    for name in names:
        layer = module.get_submodule(name)
        assert isinstance(layer, nn.Conv2d)
        sizes: Any = {size: getattr(layer, size) for size in ("kernel_size", "stride", "padding")}
        exchanged = Conv2d(layer.in_channels, layer.out_channels, bias=layer.bias is not None, **sizes)
        exchanged.weight, exchanged.bias = layer.weight, layer.bias
        setattr(module, name, exchanged)
