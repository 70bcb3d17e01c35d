"""Kernel generators: modules that map a layer's input [N, C, *S] to a kernel map [N, G, *K, *ceil(S / stride)]."""

import math
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..ops.arguments import same_padding
from ..ops.layer import average_windows
from .norms import ChannelL2Norm, has_hooks, norm_act

CONVOLUTION = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


class _AvgPool3d(nn.AvgPool3d):
    """Average pooling that accepts images smaller than a window, as torch's in 1d and 2d do."""

    def forward(self, input: Tensor) -> Tensor:
        return average_windows(input, self.stride)  # type: ignore[arg-type]


AVERAGE_POOL = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: _AvgPool3d}


KernelInit = Literal["identity", "box", "paper"] | Callable[[Tensor, Tensor], None]
KERNEL_INITS = ("identity", "box", "paper")


class BottleneckGenerator(nn.Module):
    """The paper's generator (section 3.2): reduce, norm, activation, span; by default invariant to the input's scale.

    By default the norm is an L2 norm over channels and kernels are initialised to the identity, so the layer is of
    degree one in its input, as a convolution is, at any depth; and a step of the span's weights changes kernels by the
    same amount at every width. In the paper's generator,
    ``norm_layer=nn.BatchNorm2d, kernel_init="paper"``, kernels grow with the features, so the layer is quadratic in its
    input, and they are initialised with random signs.

    With a stride above 1 the input is first averaged over windows of the stride's size, clipped at the border. Cost:
    ``(C*C/r + C/r * G*prod(K)) * prod(O)`` multiply-adds.

    Args:
        channels: C of the layer's input.
        kernel_size: K, one int per spatial axis; their count selects 1d, 2d or 3d.
        groups: G, the number of kernels per position.
        stride: one int per spatial axis.
        dilation: one int per spatial axis; ignored.
        reduction_ratio: r; the hidden width is max(1, C // r).
        norm_layer: between reduction and activation; called with the hidden width. None is `ChannelL2Norm` (the paper
            has batch norm).
        act_layer: called without arguments.
        kernel_init: the initial kernels. "identity": 1 at the window's centre, 0 elsewhere, at every position. "box":
            the window's average. Both zero the span's weight, which still gets a gradient in the first step. "paper":
            random, by the span convolution's default initialisation. Or a callable, which gets the span's weight as [G,
            prod(K), C/r] and its bias as [G, prod(K)], and fills them in place.

    Shapes: ``[N, C, *S] -> [N, G, *K, *ceil(S / stride)]``.

    Raises:
        ValueError: kernel_init is none of these.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: Sequence[int],
        groups: int,
        stride: Sequence[int],
        dilation: Sequence[int] = (),
        reduction_ratio: int = 4,
        norm_layer: Callable[[int], nn.Module] | None = None,
        act_layer: Callable[[], nn.Module] = nn.ReLU,
        kernel_init: KernelInit = "identity",
    ) -> None:
        super().__init__()
        if not callable(kernel_init) and kernel_init not in KERNEL_INITS:
            raise ValueError(f"kernel_init must be identity, box, paper or a callable, got {kernel_init!r}")
        dims = len(kernel_size)
        width = max(1, channels // reduction_ratio)
        self.map_shape = (groups, *kernel_size)
        self.kernel_init = kernel_init
        self.pool = _pool(stride)
        self.reduce = CONVOLUTION[dims](channels, width, 1, bias=False)
        self.norm = ChannelL2Norm() if norm_layer is None else norm_layer(width)
        self.act = act_layer()
        self.span = CONVOLUTION[dims](width, groups * math.prod(kernel_size), 1)
        self.init_kernels()

    @torch.no_grad()
    def init_kernels(self) -> None:
        """Initialises the span by `kernel_init`; "paper" leaves its parameters as they are."""
        if self.kernel_init == "paper":
            return
        groups, taps = self.map_shape[0], math.prod(self.map_shape[1:])
        weight, bias = self.span.weight.view(groups, taps, -1), self.span.bias.view(groups, taps)  # type: ignore[union-attr]
        if callable(self.kernel_init):
            self.kernel_init(weight, bias)
            return
        weight.zero_()
        if self.kernel_init == "box":
            bias.fill_(1 / taps)
        else:
            bias.zero_()
            centre: tuple[Any, ...] = (slice(None), *((size - 1) // 2 for size in self.map_shape[1:]))
            bias.view(self.map_shape)[centre] = 1

    def hidden(self, input: Tensor) -> Tensor:
        """The input of the span convolution: [N, C, *S] -> [N, width, *O]."""
        return norm_act(self.reduce(self.pool(input)), self.norm, self.act)

    def forward(self, input: Tensor) -> Tensor:
        """[N, C, *S] -> [N, G, *K, *O]."""
        span: Tensor = self.span(self.hidden(input))
        return span.unflatten(1, self.map_shape)

    def is_fusable(self) -> bool:
        """Whether the fused layer can replace `forward`: it is `hidden` and a 1x1 span convolution, without hooks."""
        plain = type(self) is BottleneckGenerator and type(self.span) is CONVOLUTION[len(self.map_shape) - 1]
        return plain and not has_hooks(self) and not has_hooks(self.span) and _is_pointwise(self.span)


class LinearGenerator(nn.Module):
    """One 1x1 convolution from the input to the kernels, without a bottleneck (paper, section 4.3).

    It has no norm: kernels grow with the input, so the layer is quadratic in it.

    With a stride above 1 the input is first averaged over windows of the stride's size, clipped at the border. Cost:
    ``C * G*prod(K) * prod(O)`` multiply-adds.

    Args:
        channels: C of the layer's input.
        kernel_size: K, one int per spatial axis; their count selects 1d, 2d or 3d.
        groups: G, the number of kernels per position.
        stride: one int per spatial axis.
        dilation: one int per spatial axis; ignored.

    Shapes: ``[N, C, *S] -> [N, G, *K, *ceil(S / stride)]``.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: Sequence[int],
        groups: int,
        stride: Sequence[int],
        dilation: Sequence[int] = (),
    ) -> None:
        super().__init__()
        self.map_shape = (groups, *kernel_size)
        self.pool = _pool(stride)
        self.span = CONVOLUTION[len(kernel_size)](channels, math.prod(self.map_shape), 1)

    def forward(self, input: Tensor) -> Tensor:
        """[N, C, *S] -> [N, G, *K, *O]."""
        span: Tensor = self.span(self.pool(input))
        return span.unflatten(1, self.map_shape)


class ContextGenerator(BottleneckGenerator):
    """The bottleneck with a 3x3 depthwise convolution before the span: kernels depend on a 3x3 neighbourhood.

    Cost: that of the bottleneck plus ``3**dims * C/r * prod(O)`` multiply-adds. Arguments as in `BottleneckGenerator`.

    Shapes: ``[N, C, *S] -> [N, G, *K, *ceil(S / stride)]``.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: Sequence[int],
        groups: int,
        stride: Sequence[int],
        dilation: Sequence[int] = (),
        reduction_ratio: int = 4,
        norm_layer: Callable[[int], nn.Module] | None = None,
        act_layer: Callable[[], nn.Module] = nn.ReLU,
        kernel_init: KernelInit = "identity",
    ) -> None:
        super().__init__(
            channels, kernel_size, groups, stride, dilation, reduction_ratio, norm_layer, act_layer, kernel_init
        )
        width = self.span.in_channels
        self.context = CONVOLUTION[len(kernel_size)](width, width, 3, padding=1, groups=width)

    def hidden(self, input: Tensor) -> Tensor:
        """The input of the span convolution: [N, C, *S] -> [N, width, *O]."""
        hidden: Tensor = self.act(self.context(super().hidden(input)))
        return hidden


class PositionGenerator(nn.Module):
    """Kernels that depend only on the position, not on the input: a two-layer network of its coordinates.

    Coordinates run from -1 to 1 along every axis, for any size. Cost: ``(dims * width + width *
    G*prod(K)) * prod(O)`` multiply-adds, once for a whole batch.

    Args:
        channels: of the layer's input; ignored.
        kernel_size: K, one int per spatial axis; their count selects 1d, 2d or 3d.
        groups: G, the number of kernels per position.
        stride: one int per spatial axis.
        dilation: one int per spatial axis; ignored.
        width: of the hidden layer.

    Shapes: ``[N, C, *S] -> [N, G, *K, *ceil(S / stride)]``.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: Sequence[int],
        groups: int,
        stride: Sequence[int],
        dilation: Sequence[int] = (),
        width: int = 32,
    ) -> None:
        super().__init__()
        dims = len(kernel_size)
        self.stride, self.map_shape = tuple(stride), (groups, *kernel_size)
        self.embed = CONVOLUTION[dims](dims, width, 1)
        self.act = nn.GELU()
        self.span = CONVOLUTION[dims](width, math.prod(self.map_shape), 1)

    def forward(self, input: Tensor) -> Tensor:
        """[N, C, *S] -> [N, G, *K, *O]."""
        weight = self.embed.weight
        sizes = [-(-size // step) for size, step in zip(input.shape[2:], self.stride, strict=True)]
        axes = [torch.linspace(-1, 1, size, device=weight.device, dtype=weight.dtype) for size in sizes]
        coordinates = torch.stack(torch.meshgrid(*axes, indexing="ij"))[None]
        span: Tensor = self.span(self.act(self.embed(coordinates)))
        return span.unflatten(1, self.map_shape).expand(len(input), *[-1] * (1 + 2 * len(sizes)))


class SoftmaxGenerator(BottleneckGenerator):
    """The bottleneck with a softmax over each kernel: weights are positive and sum to 1 over the taps inside the input.

    The layer is then a weighted average of its window, as in attention and kernel-predicting denoisers. Same cost as
    the bottleneck. Arguments as in `BottleneckGenerator`, except that `dilation` determines which taps are inside, and
    that the logits are initialised randomly.

    Shapes: ``[N, C, *S] -> [N, G, *K, *ceil(S / stride)]``.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: Sequence[int],
        groups: int,
        stride: Sequence[int],
        dilation: Sequence[int],
        reduction_ratio: int = 4,
        norm_layer: Callable[[int], nn.Module] | None = None,
        act_layer: Callable[[], nn.Module] = nn.ReLU,
    ) -> None:
        super().__init__(
            channels, kernel_size, groups, stride, dilation, reduction_ratio, norm_layer, act_layer, "paper"
        )
        self.window = (tuple(stride), same_padding(kernel_size, dilation), tuple(dilation))

    def forward(self, input: Tensor) -> Tensor:
        """[N, C, *S] -> [N, G, *K, *O]."""
        return window_softmax(super().forward(input), input.shape[2:], *self.window)


def window_softmax(
    logits: Tensor,
    sizes: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[tuple[int, int]],
    dilation: Sequence[int],
) -> Tensor:
    """Softmax over the taps of each window that are inside the input; the others get weight 0.

    A window without any tap inside gets the softmax over all taps; the operator never reads it.

    Args:
        logits: ``[N, G, *K, *O]``.
        sizes: of the input's spatial axes.
        stride: one int per spatial axis.
        padding: (left, right) per spatial axis.
        dilation: one int per spatial axis.

    Returns:
        The same shape.
    """
    dims, outside = len(sizes), []
    for axis, size in enumerate(sizes):
        taps = torch.arange(logits.shape[2 + axis], device=logits.device) * dilation[axis] - padding[axis][0]
        positions = torch.arange(logits.shape[2 + dims + axis], device=logits.device) * stride[axis]
        read = taps[:, None] + positions
        shape = [1] * (2 * dims)
        shape[axis], shape[dims + axis] = read.shape
        outside.append(((read < 0) | (read >= size)).view(shape))
    excluded = reduce(torch.logical_or, outside)
    excluded = excluded & ~excluded.flatten(0, dims - 1).all(0)
    mask = torch.zeros(excluded.shape, dtype=logits.dtype, device=logits.device).masked_fill(excluded, -torch.inf)
    kernel = logits.shape[2 : 2 + dims]
    if logits.stride(1 + dims) > logits.stride(-1):
        return (logits + mask).flatten(2, 1 + dims).softmax(2).unflatten(2, kernel)
    # channels_last: permuted to memory order [N, *O, G, *K], where softmax over the last axis copies nothing
    first, last = tuple(range(1, 2 + dims)), tuple(range(-1 - dims, 0))
    rows = logits.movedim(first, last) + mask.unsqueeze(0).movedim(tuple(range(1 + dims)), last).contiguous()
    return rows.flatten(-dims).softmax(-1).unflatten(-1, kernel).movedim(last, first)


def _pool(stride: Sequence[int]) -> nn.Module:
    """Average pooling over windows of the stride's size, clipped at the border."""
    strides = tuple(stride)
    if max(strides) == 1:
        return nn.Identity()
    return AVERAGE_POOL[len(strides)](strides, strides, ceil_mode=True, count_include_pad=False)


def _is_pointwise(convolution: Any) -> bool:
    ones = (*convolution.kernel_size, *convolution.stride, convolution.groups)
    return set(ones) == {1} and set(convolution.padding) == {0}
