"""The layers that are timed: the involutions of RedNet-50 at 224x224, and one of a detector's neck."""

from typing import NamedTuple

import torch
from torch import Tensor


class Case(NamedTuple):
    """One layer's call: channels_last, 16 channels per group, padding K // 2; bytes are those of float32."""

    name: str
    channels: int
    height: int
    width: int
    kernel_size: int
    stride: int

    @property
    def groups(self) -> int:
        """G, the number of kernels per position."""
        return self.channels // 16

    @property
    def output(self) -> tuple[int, int]:
        """The output's height and width."""
        return -(-self.height // self.stride), -(-self.width // self.stride)

    @property
    def window(self) -> tuple[list[int], list[int], list[int]]:
        """Stride, padding and dilation, as the operators take them."""
        return [self.stride] * 2, [self.kernel_size // 2] * 2, [1, 1]

    def tensors(
        self, batch: int, device: str = "cpu", dtype: torch.dtype = torch.float32
    ) -> tuple[Tensor, Tensor, Tensor]:
        """input, kernel map and output gradient, in channels_last memory; the first two require gradients."""
        torch.manual_seed(0)
        k, like = self.kernel_size, {"device": device, "dtype": dtype, "memory_format": torch.channels_last}
        x = torch.randn(batch, self.channels, self.height, self.width).to(**like)  # type: ignore[call-overload]
        flat = torch.randn(batch, self.groups * k * k, *self.output).to(**like)  # type: ignore[call-overload]
        g = torch.randn(batch, self.channels, *self.output).to(**like)  # type: ignore[call-overload]
        return x.requires_grad_(), flat.unflatten(1, (self.groups, k, k)).requires_grad_(), g

    def flops(self, batch: int) -> float:
        """Operations of any of the three maps, a multiply-add being two."""
        rows, columns = self.output
        return 2.0 * self.kernel_size**2 * batch * self.channels * rows * columns

    def bytes(self, batch: int) -> float:
        """The memory traffic of any of the three maps: input, kernel map and output, once each."""
        rows, columns = self.output
        maps = self.groups * self.kernel_size**2
        return 4.0 * batch * (self.channels * self.height * self.width + (maps + self.channels) * rows * columns)

    def fused_flops(self, batch: int) -> float:
        """Operations of the fused layer: those of the span convolution, from C // 4 hidden features, and of apply."""
        rows, columns = self.output
        span = self.channels // 4 * self.groups * self.kernel_size**2
        return self.flops(batch) + 2.0 * batch * span * rows * columns

    def fused_bytes(self, batch: int) -> float:
        """The memory traffic of the fused layer: input, hidden features and output, once each."""
        rows, columns = self.output
        image = self.channels * self.height * self.width
        return 4.0 * batch * (image + (self.channels // 4 + self.channels) * rows * columns)


CASES = {
    case.name: case
    for case in (
        Case("C64@56", 64, 56, 56, 7, 1),
        Case("C32@112", 32, 112, 112, 3, 1),
        Case("C128@56/2", 128, 56, 56, 7, 2),
        Case("C128@28", 128, 28, 28, 7, 1),
        Case("C256@28/2", 256, 28, 28, 7, 2),
        Case("C256@14", 256, 14, 14, 7, 1),
        Case("C512@14/2", 512, 14, 14, 7, 2),
        Case("C512@7", 512, 7, 7, 7, 1),
    )
}
NECK = Case("C256@200x304", 256, 200, 304, 7, 1)  # a feature pyramid's finest level
