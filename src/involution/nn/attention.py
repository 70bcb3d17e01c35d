"""Local self-attention as an involution whose kernels are softmaxed products of queries and keys (section 3.3)."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops.arguments import Ints, per_axis, same_padding
from ..ops.functional import correlate, involve
from .generators import CONVOLUTION, window_softmax

CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
RELATIVE_POSITIONS = ("none", "bias", "factorised")


class AttentionGenerator(nn.Module):
    """Kernels that are attention weights: of every window, how much its keys agree with the query in its middle.

        k[n, head, u, o] = softmax over u of (q[o*s] . (key[o*s + u*d - p] + r[u])) / sqrt(C / heads)

    Taps outside the input are left out of the softmax. The products are the operator's own map `correlate`: nothing is
    unfolded. Cost: ``C*C*(prod(O) + prod(S)) + prod(K) * C * prod(O)`` multiply-adds, the last term twice with
    factorised relative positions.

    Args:
        channels: C of the layer's input.
        kernel_size: K, one number per spatial axis; their count decides between 1d, 2d and 3d.
        groups: the heads; they divide C.
        stride: one number per spatial axis; queries are at every stride-th position.
        dilation: one number per spatial axis.
        relative_position: "none"; "bias", a number for every head and offset; or "factorised", an embedding of every
            axis's offset that the query is multiplied with, each of its own part of a head's channels (as in
            stand-alone self-attention, Ramachandran et al. 2019).

    Shapes: ``[N, C, *S] -> [N, heads, *K, *ceil(S / stride)]``.

    Raises:
        ValueError: relative_position is none of the three; factorised, and the axes do not divide a head's channels.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: Sequence[int],
        groups: int,
        stride: Sequence[int],
        dilation: Sequence[int],
        relative_position: str = "none",
    ) -> None:
        super().__init__()
        if relative_position not in RELATIVE_POSITIONS:
            raise ValueError(
                f"relative_position must be one of {', '.join(RELATIVE_POSITIONS)}, got {relative_position!r}"
            )
        dims, width = len(kernel_size), channels // groups
        self.groups, self.kernel_size = groups, tuple(kernel_size)
        self.stride, self.dilation = tuple(stride), tuple(dilation)
        self.padding = same_padding(self.kernel_size, self.dilation)
        self.query = CONVOLUTION[dims](channels, channels, 1, stride=self.stride, bias=False)  # type: ignore[arg-type]
        self.key = CONVOLUTION[dims](channels, channels, 1, bias=False)
        self.relative_position = relative_position
        if relative_position == "bias":
            self.bias = nn.Parameter(torch.zeros(groups, *self.kernel_size))
        elif relative_position == "factorised":
            if width % dims:
                raise ValueError(
                    f"relative_position='factorised' wants heads whose channels divide by {dims}, got {width}"
                )
            self.embeddings = nn.ParameterList(
                nn.Parameter(torch.randn(groups, width // dims, size) * (dims / width) ** 0.5) for size in kernel_size
            )

    def forward(self, input: Tensor) -> Tensor:
        """[N, C, *S] -> [N, heads, *K, *O]."""
        query, key = self.query(input), self.key(input)
        query = query / math.sqrt(query.shape[1] // self.groups)
        window = (self.stride, self.padding, self.dilation)
        logits = correlate(query, key, self.groups, self.kernel_size, *window)
        if self.relative_position == "bias":
            logits = logits + self.bias.reshape(*self.bias.shape, *[1] * len(self.kernel_size))
        elif self.relative_position == "factorised":
            logits = logits + self._positions(query)
        return window_softmax(logits, input.shape[2:], *window)

    def _positions(self, query: Tensor) -> Tensor:
        """Products of queries and embeddings, [N, heads, *K, *O]: a 1x1 convolution with a group for every head."""
        parts, ones = [], [1] * len(self.kernel_size)
        for axis, embedding in enumerate(self.embeddings):
            shape = [*ones[:axis], -1, *ones[axis + 1 :]]
            parts.append(embedding.unflatten(2, shape).expand(-1, -1, *self.kernel_size))
        weight = torch.cat(parts, 1).flatten(2).transpose(1, 2).flatten(0, 1).unflatten(1, (-1, *ones))
        return CONVOLVE[len(ones)](query, weight, groups=self.groups).unflatten(1, (self.groups, *self.kernel_size))


class _LocalSelfAttention(nn.Module):
    """The body of all three layers; see :class:`LocalSelfAttention2d`."""

    dims: int

    def __init__(
        self,
        channels: int,
        kernel_size: Ints = 7,
        stride: Ints = 1,
        dilation: Ints = 1,
        heads: int = 8,
        relative_position: str = "none",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("channels", channels), ("heads", heads)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a positive int, got {value!r}")
        if channels % heads:
            raise ValueError(f"heads must divide channels, got heads={heads}, channels={channels}")
        self.channels, self.heads = channels, heads
        self.kernel_size = per_axis("kernel_size", kernel_size, self.dims, 1)
        self.stride = per_axis("stride", stride, self.dims, 1)
        self.dilation = per_axis("dilation", dilation, self.dims, 1)
        self.generator = AttentionGenerator(
            channels, self.kernel_size, heads, self.stride, self.dilation, relative_position
        )
        self.value = CONVOLUTION[self.dims](channels, channels, 1, bias=False)
        self.to(device=device, dtype=dtype)

    def forward(self, input: Tensor) -> Tensor:
        """[N, C, *S] or [C, *S] -> the same with sizes ceil(S / stride)."""
        if input.dim() == self.dims + 1:
            batched: Tensor = self(input.unsqueeze(0))
            return batched.squeeze(0)
        if input.dim() != self.dims + 2 or input.shape[1] != self.channels:
            axes = ", ".join("DHW"[3 - self.dims :])
            raise ValueError(
                f"input must be [N, {self.channels}, {axes}] or [{self.channels}, {axes}], got {list(input.shape)}"
            )
        return involve(self.value(input), self.generator(input), self.stride, self.generator.padding, self.dilation)

    def extra_repr(self) -> str:
        """The arguments."""
        parts: list[Any] = [self.channels, f"kernel_size={self.kernel_size}", f"stride={self.stride}"]
        if max(self.dilation) > 1:
            parts.append(f"dilation={self.dilation}")
        parts += [f"heads={self.heads}", f"relative_position={self.generator.relative_position!r}"]
        return ", ".join(map(str, parts))


class LocalSelfAttention1d(_LocalSelfAttention):
    """Local self-attention over [N, C, L]; see :class:`LocalSelfAttention2d`."""

    dims = 1


class LocalSelfAttention2d(_LocalSelfAttention):
    """Self-attention of every position over the window around it (paper, section 3.3).

    An involution of the values by :class:`AttentionGenerator`'s kernels: what torch's scaled_dot_product_attention
    gives under the mask of the neighbourhood, in memory and time that grow with the window and not with the image.

    Args:
        channels: C, of input and output.
        kernel_size: K, the window: an int or one per axis.
        stride: an int or one per axis; queries are at every stride-th position.
        dilation: an int or one per axis.
        heads: that divide C.
        relative_position: "none", "bias" or "factorised", see :class:`AttentionGenerator`.
        device: of the parameters.
        dtype: of the parameters.

    Shapes: [N, C, H, W] or [C, H, W] -> the same with ceil(H / stride), ceil(W / stride).

    Raises:
        ValueError: an argument or the input does not fit.
    """

    dims = 2


class LocalSelfAttention3d(_LocalSelfAttention):
    """Local self-attention over [N, C, D, H, W]; see :class:`LocalSelfAttention2d`."""

    dims = 3
