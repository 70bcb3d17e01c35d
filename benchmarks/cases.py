"""The shapes that are timed: the involutions of RedNet-50 at 224x224."""

from typing import NamedTuple

import torch
from torch import Tensor


class Case(NamedTuple):
    """One layer's call, channels_last, float32, group width 16, padding K // 2."""

    name: str
    channels: int
    size: int
    kernel_size: int
    stride: int

    def tensors(self, batch: int) -> tuple[Tensor, Tensor, Tensor]:
        """input, kernel map and output gradient, in channels_last memory; the first two require gradients."""
        torch.manual_seed(0)
        out, groups, k = self.size // self.stride, self.channels // 16, self.kernel_size
        x = torch.randn(batch, self.channels, self.size, self.size).to(memory_format=torch.channels_last)
        flat = torch.randn(batch, groups * k * k, out, out).to(memory_format=torch.channels_last)
        g = torch.randn(batch, self.channels, out, out).to(memory_format=torch.channels_last)
        return x.requires_grad_(), flat.unflatten(1, (groups, k, k)).requires_grad_(), g


CASES = {
    case.name: case
    for case in (
        Case("C64@56", 64, 56, 7, 1),
        Case("C32@112", 32, 112, 3, 1),
        Case("C128@56->28", 128, 56, 7, 2),
        Case("C128@28", 128, 28, 7, 1),
        Case("C256@14", 256, 14, 7, 1),
        Case("C512@7", 512, 7, 7, 1),
    )
}
