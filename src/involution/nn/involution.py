"""Involution1d, Involution2d and Involution3d: layers of a kernel generator and the operator."""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..ops.arguments import Ints, per_axis, same_padding
from ..ops.backends import selection
from ..ops.functional import involve
from ..ops.fused import fused_layer
from .generators import BottleneckGenerator, KernelInit


class _Involution(nn.Module):
    """The implementation of all three layers; see :class:`Involution2d`."""

    dims: int

    def __init__(
        self,
        channels: int,
        kernel_size: Ints = 7,
        stride: Ints = 1,
        padding: Ints | None = None,
        dilation: Ints = 1,
        group_channels: int | Literal["all"] = 16,
        reduction_ratio: int = 4,
        norm_layer: Callable[[int], nn.Module] | None = None,
        act_layer: Callable[[], nn.Module] = nn.ReLU,
        kernel_init: KernelInit = "identity",
        kernel_generator: nn.Module | Callable[..., nn.Module] | None = None,
        memory_efficient: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        group_channels = channels if group_channels == "all" else group_channels
        for name, value in (
            ("channels", channels),
            ("group_channels", group_channels),
            ("reduction_ratio", reduction_ratio),
        ):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a positive int, got {value!r}")
        if channels % group_channels != 0:
            raise ValueError(
                f"group_channels must divide channels, got group_channels={group_channels}, channels={channels}"
            )
        if memory_efficient and kernel_generator is not None:
            raise ValueError("memory_efficient=True wants the default kernel generator, got a kernel_generator")
        self.memory_efficient = memory_efficient
        self.channels = channels
        self.group_channels = group_channels
        self.groups = channels // group_channels
        self.kernel_size = per_axis("kernel_size", kernel_size, self.dims, 1)
        self.stride = per_axis("stride", stride, self.dims, 1)
        self.dilation = per_axis("dilation", dilation, self.dims, 1)
        self._sides = same_padding(self.kernel_size, self.dilation)
        self.padding = tuple(left for left, _ in self._sides)
        if padding is not None and per_axis("padding", padding, self.dims, 0) != self.padding:
            raise ValueError(
                f"padding must be None or {self.padding}, which gives outputs of ceil(size / stride), got {padding!r} "
                f"(the function involution{self.dims}d takes any padding)"
            )
        if kernel_generator is None:
            self.generator: nn.Module = BottleneckGenerator(
                channels,
                self.kernel_size,
                self.groups,
                self.stride,
                self.dilation,
                reduction_ratio,
                norm_layer,
                act_layer,
                kernel_init,
            )
        elif isinstance(kernel_generator, nn.Module):
            self.generator = kernel_generator
        elif not callable(kernel_generator):
            raise TypeError(f"kernel_generator must be an nn.Module or make one, got {kernel_generator!r}")
        else:
            self.generator = kernel_generator(channels, self.kernel_size, self.groups, self.stride, self.dilation)
        if not isinstance(self.generator, nn.Module):
            raise TypeError(f"kernel_generator must make an nn.Module, got {type(self.generator).__name__}")
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
        generator = self.generator
        if (
            isinstance(generator, BottleneckGenerator)
            and generator.is_fusable()
            and (self.memory_efficient or (not torch.is_grad_enabled() and _fuses(input)))
        ):
            span, hidden = generator.span, generator.hidden(input)
            return fused_layer(
                input, hidden, span.weight.flatten(1), span.bias, self.kernel_size, self.stride, self.dilation
            )
        kernel_map = generator(input)
        wanted = (input.shape[0], self.groups, *self.kernel_size)
        if kernel_map.dim() != 2 + 2 * self.dims or tuple(kernel_map.shape[: 2 + self.dims]) != wanted:
            raise ValueError(
                f"the kernel generator must return [N, G, *K, *O] with [N, G, *K] = {list(wanted)} and {self.dims} "
                f"output sizes, got {list(kernel_map.shape)}"
            )
        return involve(input, kernel_map, self.stride, self._sides, self.dilation)

    def extra_repr(self) -> str:
        """The arguments, in the form of nn.Conv2d."""
        parts: list[Any] = [self.channels, f"kernel_size={self.kernel_size}", f"stride={self.stride}"]
        if max(self.dilation) > 1:
            parts.append(f"dilation={self.dilation}")
        return ", ".join(map(str, [*parts, f"group_channels={self.group_channels}"]))


def _fuses(input: Tensor) -> bool:
    """Whether the fused layer runs: an exported program has it on every machine, whatever kernels this one has."""
    return torch.compiler.is_exporting() or selection.fuses(input)


class Involution1d(_Involution):
    """Involution over [N, C, L]; see :class:`Involution2d`."""

    dims = 1


class Involution2d(_Involution):
    """The involution layer (paper, section 3.2): generates kernels from the input and applies them to it.

    By default the output scales linearly with the input, and the layer is initialised as the identity (with a stride,
    as subsampling), so it can be stacked to any depth with or without norms. The paper's layer, for its weights and
    tables, is ``Involution2d(channels, norm_layer=nn.BatchNorm2d, kernel_init="paper")``.

    The output has ceil(S / stride) positions per axis; the left padding is floor(dilation * (K - 1) / 2).

    Args:
        channels: C, of input and output.
        kernel_size: K, an int or one per axis.
        stride: an int or one per axis.
        padding: None, or the value that None stands for; the output size is fixed.
        dilation: an int or one per axis.
        group_channels: channels that share a kernel; must divide `channels`; or "all".
        reduction_ratio: of the default generator.
        norm_layer: of the default generator, before its activation; called with the hidden width. None is an L2 norm
            over channels (the paper has batch norm).
        act_layer: of the default generator; called without arguments.
        kernel_init: of the default generator: the initial kernels, "identity", "box", "paper" (random) or a callable;
            see `BottleneckGenerator`.
        kernel_generator: None (`BottleneckGenerator`), a module, or a callable (channels, kernel_size, groups, stride,
            dilation) -> module. The module maps the layer's input ``[N, C, *S]`` to
            ``[N, G, *K, *ceil(S / stride)]``.
        memory_efficient: training saves the input and the hidden features, but not the kernel map, which is prod(K) /
            group_channels times the output's size: backward recomputes it, a patch at a time. Same gradients, more
            arithmetic. Without gradients the map is never stored in either case. Default generator only.
        device: of the parameters.
        dtype: of the parameters.

    Shapes: [N, C, H, W] -> [N, C, ceil(H / stride), ceil(W / stride)]; the batch axis may be missing.

    Raises:
        TypeError: kernel_generator is neither a module nor a callable that returns one.
        ValueError: an argument or the input does not fit, or the generator's kernel map does not fit the layer.
    """

    dims = 2


class Involution3d(_Involution):
    """Involution over [N, C, D, H, W]; see :class:`Involution2d`."""

    dims = 3
