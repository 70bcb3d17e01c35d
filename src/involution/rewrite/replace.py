"""Replaces the 3x3 convolutions of any network by involutions."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ..nn.involution import Involution2d
from ..ops.arguments import Ints


class Replaced(NamedTuple):
    """The result of `replace`.

    `replaced` has the names of the replaced convolutions, `left` those of all other 3x3 convolutions with the reason;
    `parameters` and `multiply_adds` are the network's before and after (multiply-adds of one forward pass over the
    example, None without one).
    """

    replaced: list[str]
    left: dict[str, str]
    parameters: tuple[int, int]
    multiply_adds: tuple[int, int] | None

    def __str__(self) -> str:
        lines = [f"replaced {len(self.replaced)} of {len(self.replaced) + len(self.left)} 3x3 convolutions"]
        lines += [f"left {name}: {reason}" for name, reason in self.left.items()]
        for what, pair in (("parameters", self.parameters), ("multiply-adds", self.multiply_adds)):
            if pair is not None:
                lines.append(f"{what}: {pair[0]:,} -> {pair[1]:,} ({pair[1] / max(1, pair[0]):.0%})")
        return "\n".join(lines)


def replace(
    module: nn.Module,
    filter: Callable[[str, nn.Conv2d], bool] | None = None,
    kernel_size: Ints = 7,
    group_channels: int | Literal["all"] = 16,
    example_input: Tensor | None = None,
    **involution: Any,
) -> Replaced:
    """Replaces every 3x3 convolution that an involution can stand in for, in place.

    Such a convolution has as many output as input channels, a multiple of group_channels, one group, and zero padding
    that preserves the size (with a stride: ceil(S / stride)). The new layers are initialised as the identity, so the
    network has to be trained again. All other weights, and stride, dilation, device, dtype and training mode, are
    preserved; a convolution's bias is dropped.

    Args:
        module: the network, modified in place; not itself a convolution.
        filter: called with name and convolution; returns whether to replace it. None replaces all.
        kernel_size: of the involutions.
        group_channels: channels that share a kernel, or "all".
        example_input: an input of the network, to count its multiply-adds before and after.
        **involution: further arguments of `Involution2d`.

    Returns:
        What was replaced, what was not and why, and the costs; its string is a report.

    Raises:
        TypeError: module is not a module.
        ValueError: module is itself a convolution, or an argument does not fit.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be an nn.Module, got {type(module).__name__}")
    if isinstance(module, nn.Conv2d):
        raise ValueError("module must be a network that holds convolutions, got a convolution itself")
    width = group_channels
    if width != "all" and (not isinstance(width, int) or isinstance(width, bool) or width < 1):
        raise ValueError(f"group_channels must be a positive int or 'all', got {width!r}")
    before = _cost(module, example_input)
    replaced: dict[str, Involution2d] = {}
    left: dict[str, str] = {}
    made: dict[nn.Module, Involution2d] = {}  # a convolution may be shared
    for name, found in list(module.named_modules(remove_duplicate=False)):
        if not isinstance(found, nn.Conv2d) or found.kernel_size != (3, 3):
            continue
        reason = _misfit(found, group_channels) or (
            "the filter excludes it" if filter and not filter(name, found) else ""
        )
        if reason:
            left[name] = reason
            continue
        if found not in made:
            made[found] = _involution(found, kernel_size, group_channels, involution)
        replaced[name] = made[found]
    for name, layer in replaced.items():  # last, so that an error leaves the network unchanged
        module.set_submodule(name, layer)
    after = _cost(module, example_input)
    products = None if example_input is None else (before[1], after[1])
    return Replaced(list(replaced), left, (before[0], after[0]), products)


def _misfit(convolution: nn.Conv2d, group_channels: int | Literal["all"]) -> str:
    """Why no involution can stand in for it; empty if one can."""
    ins, outs = convolution.in_channels, convolution.out_channels
    if type(convolution) is not nn.Conv2d:
        return f"it is a {type(convolution).__name__}"
    if convolution.groups != 1:
        return f"it has {convolution.groups} groups"
    if ins != outs:
        return f"it has {ins} input and {outs} output channels"
    if group_channels != "all" and ins % group_channels:
        return f"its {ins} channels do not divide by {group_channels}"
    padding = convolution.padding
    if padding != convolution.dilation and not (padding == "same" and convolution.stride == (1, 1)):
        return f"its padding is {padding}, which does not preserve the size"
    if convolution.padding_mode != "zeros":
        return f"its padding is {convolution.padding_mode}"
    return ""


def _involution(
    convolution: nn.Conv2d, kernel_size: Ints, group_channels: int | Literal["all"], further: dict[str, Any]
) -> Involution2d:
    weight = convolution.weight
    layer = Involution2d(
        convolution.in_channels,
        kernel_size,
        convolution.stride,
        dilation=convolution.dilation,
        group_channels=group_channels,
        **{"device": weight.device, "dtype": weight.dtype, **further},
    )
    return layer.train(convolution.training)


@torch.no_grad()
def _cost(module: nn.Module, example_input: Tensor | None) -> tuple[int, int]:
    """Parameters, and multiply-adds of the example, in evaluation mode so that no statistics change."""
    parameters = sum(parameter.numel() for parameter in module.parameters())
    if example_input is None:
        return parameters, 0
    modes = {part: part.training for part in module.modules()}
    try:
        with FlopCounterMode(display=False) as counter:
            module.eval()(example_input)
    finally:
        for part, training in modes.items():
            part.training = training
    return parameters, counter.get_total_flops() // 2
