"""Local self-attention as an involution: the kernels are a softmax over query-key products (paper, section 3.3)."""

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
    """Kernels that are attention weights: the query at a window's centre against the keys in the window.

        k[n, head, u, o] = softmax over u of (q[o*s] . (key[o*s + u*d - p] + r[u])) / sqrt(C / heads)

    Taps outside the input are excluded from the softmax. The products are the operator's map `correlate`: nothing is
    unfolded. Cost: ``C*C*(prod(O) + prod(S)) + prod(K) * C * prod(O)`` multiply-adds, the last term twice with
    factorised relative positions.

    Args:
        channels: C of the layer's input.
        kernel_size: K, one int per spatial axis; their count selects 1d, 2d or 3d.
        groups: the number of heads, which divides C.
        stride: one int per spatial axis; queries are at every stride-th position.
        dilation: one int per spatial axis.
        relative_position: "none"; "bias", a learnt scalar per head and offset; or "factorised", a learnt embedding per
            axis and offset, each over its own share of a head's channels, multiplied with the query (stand-alone
            self-attention, Ramachandran et al. 2019).

    Shapes: ``[N, C, *S] -> [N, heads, *K, *ceil(S / stride)]``.

    Raises:
        ValueError: relative_position is none of the three, or factorised with a number of axes that does not divide a
            head's channels.
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
        """Products of queries and embeddings, [N, heads, *K, *O]: a 1x1 convolution with one group per head."""
        parts, ones = [], [1] * len(self.kernel_size)
        for axis, embedding in enumerate(self.embeddings):
            shape = [*ones[:axis], -1, *ones[axis + 1 :]]
            parts.append(embedding.unflatten(2, shape).expand(-1, -1, *self.kernel_size))
        weight = torch.cat(parts, 1).flatten(2).transpose(1, 2).flatten(0, 1).unflatten(1, (-1, *ones))
        return CONVOLVE[len(ones)](query, weight, groups=self.groups).unflatten(1, (self.groups, *self.kernel_size))


class _LocalSelfAttention(nn.Module):
    """The implementation of all three layers; see :class:`LocalSelfAttention2d`."""

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

    An involution of the values with :class:`AttentionGenerator`'s kernels. It equals torch's
    scaled_dot_product_attention under a neighbourhood mask, in memory and time proportional to the window's size, not
    to the image's.

    Args:
        channels: C, of input and output.
        kernel_size: K, the window; an int or one per axis.
        stride: an int or one per axis; queries are at every stride-th position.
        dilation: an int or one per axis.
        heads: their number, which divides C.
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
