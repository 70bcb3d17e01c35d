"""Kernel generators: modules that look at a layer's input and return its kernel map.

A generator gets the layer's input at full resolution, [N, C, *S], and returns [N, G, *K, *O] with O = ceil(S / stride).
"""

import math
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..ops.arguments import same_padding
from ..ops.layer import average_windows

CONVOLUTION = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
BATCH_NORM = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


class _AvgPool3d(nn.AvgPool3d):
    """As the others pool, also images that are smaller than a window."""

    def forward(self, input: Tensor) -> Tensor:
        return average_windows(input, self.stride)  # type: ignore[arg-type]


AVERAGE_POOL = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: _AvgPool3d}


class ChannelRMSNorm(nn.Module):
    """Divides every position by the RMS of its channels, so that their scale makes no difference; no parameters.

    It looks at nothing but the position itself: no batch, no running statistics, no other positions. float16 and
    bfloat16 take the mean square in float32. Where the RMS is not well above sqrt(eps), the result fades to 0.

    Args:
        eps: added to the mean square.

    Shapes: ``[N, C, *S] -> [N, C, *S]``.
    """

    def __init__(self, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, input: Tensor) -> Tensor:
        """x / sqrt(mean of x**2 over the channels + eps)."""
        last = input.movedim(1, -1)
        return nn.functional.rms_norm(last, (last.shape[-1],), eps=self.eps).movedim(-1, 1)


KernelInit = Literal["identity", "box", "paper"] | Callable[[Tensor, Tensor], None]
KERNEL_INITS = ("identity", "box", "paper")


class BottleneckGenerator(nn.Module):
    """The paper's generator (section 3.2), reduce, normalise, activate, span, its input's scale removed.

    By default the norm divides the reduced features by their RMS at every position, and kernels begin as the identity:
    the layer is of degree one in its input, as a convolution is, at any depth. In the paper's own generator,
    ``norm_layer=nn.BatchNorm2d, kernel_init="paper"``, kernels grow with the features, which makes the layer quadratic
    in its input, and begin with random signs.

    With a stride above 1 the input is first averaged over windows of the stride's size, the last one cut off at the
    border. Cost: ``(C*C/r + C/r * G*prod(K)) * prod(O)`` multiply-adds.

    Args:
        channels: C of the layer's input.
        kernel_size: K, one number per spatial axis; their count decides between 1d, 2d and 3d.
        groups: G, the number of kernels per position.
        stride: one number per spatial axis.
        dilation: one number per spatial axis; makes no difference.
        reduction_ratio: r; the hidden width is max(1, C // r).
        norm_layer: called with the hidden width, for the norm between reduction and activation; None has a
            `ChannelRMSNorm` (the paper's is BatchNorm).
        act_layer: called without arguments.
        kernel_init: how kernels begin. "identity": 1 at the window's centre, 0 elsewhere, at every position. "box": the
            window's average. Both zero the span's weight, which training moves at once. "paper": random, by the span
            convolution's usual initialisation. Or a callable, which gets the span's weight as [G, prod(K), C/r] and its
            bias as [G, prod(K)], and fills them in place.

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
        self.norm = ChannelRMSNorm() if norm_layer is None else norm_layer(width)
        self.act = act_layer()
        self.span = CONVOLUTION[dims](width, groups * math.prod(kernel_size), 1)
        self.init_kernels()

    @torch.no_grad()
    def init_kernels(self) -> None:
        """Lets the kernels begin as `kernel_init` says; "paper" leaves the span's parameters as they are."""
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
        """What the span convolution reads: [N, C, *S] -> [N, width, *O]."""
        hidden: Tensor = self.act(self.norm(self.reduce(self.pool(input))))
        return hidden

    def forward(self, input: Tensor) -> Tensor:
        """[N, C, *S] -> [N, G, *K, *O]."""
        span: Tensor = self.span(self.hidden(input))
        return span.unflatten(1, self.map_shape)

    def is_fusable(self) -> bool:
        """Whether `forward` is no more than `hidden` and the span convolution: the fused layer may take its place."""
        plain = type(self) is BottleneckGenerator and type(self.span) is CONVOLUTION[len(self.map_shape) - 1]
        kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        hooked = any(getattr(module, kind) for module in (self, self.span) for kind in kinds)
        return plain and not hooked and _is_pointwise(self.span)


class LinearGenerator(nn.Module):
    """One 1x1 convolution from the input to the kernels, without a bottleneck (compared in section 4.3 of the paper).

    It has no norm: kernels grow with the input, which makes the layer quadratic in it.

    With a stride above 1 the input is first averaged over windows of the stride's size, the last one cut off at the
    border. Cost: ``C * G*prod(K) * prod(O)`` multiply-adds.

    Args:
        channels: C of the layer's input.
        kernel_size: K, one number per spatial axis; their count decides between 1d, 2d and 3d.
        groups: G, the number of kernels per position.
        stride: one number per spatial axis.
        dilation: one number per spatial axis; makes no difference.

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
    """The bottleneck with a 3x3 depthwise convolution before the span, so that a kernel sees its position's neighbours.

    Cost: that of the bottleneck and ``3**dims * C/r * prod(O)`` multiply-adds. Arguments as in `BottleneckGenerator`.

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
        """What the span convolution reads: [N, C, *S] -> [N, width, *O]."""
        hidden: Tensor = self.act(self.context(super().hidden(input)))
        return hidden


class PositionGenerator(nn.Module):
    """Kernels that depend on the position alone, not on the input: a small network of its coordinates.

    Coordinates run from -1 to 1 along every axis, so that it serves any size. Cost: ``(dims * width + width *
    G*prod(K)) * prod(O)`` multiply-adds, once for a whole batch.

    Args:
        channels: of the layer's input; makes no difference.
        kernel_size: K, one number per spatial axis; their count decides between 1d, 2d and 3d.
        groups: G, the number of kernels per position.
        stride: one number per spatial axis.
        dilation: one number per spatial axis; makes no difference.
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
    """The bottleneck, with every kernel's weights positive and summing to 1 over the taps inside the input.

    The layer then averages its window, as attention and kernel-predicting denoisers do. Costs what the bottleneck does.
    Arguments as in `BottleneckGenerator`, but that `dilation` decides which taps are inside, and kernels begin with
    random logits.

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
    """Softmax over every window's taps that are inside the input.

    The others have weight 0, but where a window has no tap inside (which the operator would not read anyway).

    Args:
        logits: ``[N, G, *K, *O]``.
        sizes: of the input's spatial axes.
        stride: one number per spatial axis.
        padding: left and right, of every spatial axis.
        dilation: one number per spatial axis.

    Returns:
        The same shape.
    """
    dims, outside = len(sizes), []
    for axis, size in enumerate(sizes):
        taps = torch.arange(logits.shape[2 + axis], device=logits.device) * dilation[axis] - padding[axis][0]
        places = torch.arange(logits.shape[2 + dims + axis], device=logits.device) * stride[axis]
        where = taps[:, None] + places
        shape = [1] * (2 * dims)
        shape[axis], shape[dims + axis] = where.shape
        outside.append(((where < 0) | (where >= size)).view(shape))
    left_out = reduce(torch.logical_or, outside)
    left_out = left_out & ~left_out.flatten(0, dims - 1).all(0)
    mask = torch.zeros(left_out.shape, dtype=logits.dtype, device=logits.device).masked_fill(left_out, -torch.inf)
    kernel = logits.shape[2 : 2 + dims]
    if logits.stride(1 + dims) > logits.stride(-1):
        return (logits + mask).flatten(2, 1 + dims).softmax(2).unflatten(2, kernel)
    # channels_last: softmax would copy it there and back. In memory's own order it is [N, *O, G, *K].
    first, last = tuple(range(1, 2 + dims)), tuple(range(-1 - dims, 0))
    rows = logits.movedim(first, last) + mask.unsqueeze(0).movedim(tuple(range(1 + dims)), last).contiguous()
    return rows.flatten(-dims).softmax(-1).unflatten(-1, kernel).movedim(last, first)


def _pool(stride: Sequence[int]) -> nn.Module:
    """Averages over windows of the stride's size, the last one cut off at the border."""
    strides = tuple(stride)
    if max(strides) == 1:
        return nn.Identity()
    return AVERAGE_POOL[len(strides)](strides, strides, ceil_mode=True, count_include_pad=False)


def _is_pointwise(convolution: Any) -> bool:
    ones = (*convolution.kernel_size, *convolution.stride, convolution.groups)
    return set(ones) == {1} and set(convolution.padding) == {0}
