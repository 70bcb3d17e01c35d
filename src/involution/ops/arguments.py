"""Argument checks of the public functions: ranks, sizes, dtypes, and the expansion to one value per spatial axis."""

from collections.abc import Iterable, Sequence
from functools import lru_cache
from numbers import Integral
from typing import Literal

import torch
from torch import Tensor

from .geometry import DTYPES, LARGEST

Ints = int | Sequence[int]
Padding = Ints | Literal["same", "valid"]


def check_call(
    input: Tensor, kernel_map: Tensor, stride: Ints = 1, padding: Padding = 0, dilation: Ints = 1
) -> tuple[Tensor, Tensor]:
    """Checks the arguments of an involution1d, 2d or 3d call without running it.

    Returns:
        The two tensors as a backend gets them: batched, and cast under autocast.

    Raises: as involution2d.
    """
    check_tensors(input, kernel_map)
    dims = kernel_map.dim() - input.dim()
    if dims not in (1, 2, 3) or input.dim() not in (dims + 1, dims + 2):
        raise ValueError(
            "input and kernel_map must be [N, C, *S] and [N, G, *K, *O] with one to three spatial axes, or both "
            f"without N, got {list(input.shape)} and {list(kernel_map.shape)}"
        )
    return checked_arguments(*per_axis_arguments(input, kernel_map, stride, padding, dilation))


def per_axis_arguments(
    input: Tensor, kernel_map: Tensor, stride: Ints, padding: Padding, dilation: Ints
) -> tuple[Tensor, Tensor, tuple[int, ...], list[tuple[int, int]], tuple[int, ...]]:
    """A call's arguments in full: batched tensors, and one value (padding: a pair) per spatial axis."""
    dims = kernel_map.dim() - input.dim()
    if input.dim() == dims + 1:
        input, kernel_map = input.unsqueeze(0), kernel_map.unsqueeze(0)
    strides = per_axis("stride", stride, dims, 1)
    dilations = per_axis("dilation", dilation, dims, 1)
    return input, kernel_map, strides, _sides(padding, kernel_map.shape[2 : 2 + dims], strides, dilations), dilations


def same_padding(kernel_size: Sequence[int], dilation: Sequence[int]) -> list[tuple[int, int]]:
    """The left and right padding per axis that makes a layer's output ceil(size / stride) positions."""
    totals = [d * (k - 1) for k, d in zip(kernel_size, dilation, strict=True)]
    return [(total // 2, total - total // 2) for total in totals]


def checked_arguments(
    input: Tensor,
    kernel_map: Tensor,
    stride: Sequence[int],
    padding: Sequence[tuple[int, int]],
    dilation: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """Casts both tensors under autocast, and raises unless they fit each other and the window."""
    input, kernel_map = under_autocast(input, kernel_map)
    check_same_kind(input, kernel_map)
    call = input.shape, kernel_map.shape, tuple(stride), tuple(padding), tuple(dilation)
    check = check_window if torch.compiler.is_compiling() else _check_window_cached
    try:
        check(*call)
    except TypeError:  # symbolic sizes are not hashable
        check_window(*call)
    return input, kernel_map


def check_window(
    input: Sequence[int],
    kernel_map: Sequence[int],
    stride: tuple[int, ...],
    padding: tuple[tuple[int, int], ...],
    dilation: tuple[int, ...],
) -> None:
    """Raises ValueError unless the shapes fit each other and the window."""
    _check_shapes(input, kernel_map)
    dims = len(stride)
    kernel, output = kernel_map[2 : 2 + dims], kernel_map[2 + dims :]
    wanted = []
    for axis, (left, right) in enumerate(padding):
        reach = dilation[axis] * (kernel[axis] - 1) + 1
        padded = input[2 + axis] + left + right
        if padded < reach:
            raise ValueError(
                f"kernel_map's kernel {list(kernel)} with dilation {list(dilation)} reaches over {reach} positions of "
                f"axis {axis}, but the padded input has {padded} there (input {list(input)})"
            )
        wanted.append((padded - reach) // stride[axis] + 1)
    if list(output) != wanted:
        raise ValueError(
            f"kernel_map must have the output's spatial sizes {wanted}, got {list(output)} (input "
            f"{list(input)}, kernel_map {list(kernel_map)}, stride {list(stride)}, padding "
            f"{list(padding)}, dilation {list(dilation)})"
        )


_check_window_cached = lru_cache(maxsize=1024)(check_window)  # a network repeats the same shapes


def check_tensors(input: Tensor, kernel_map: Tensor) -> None:
    """Raises TypeError unless both are dense tensors of a supported floating dtype."""
    for name, tensor in (("input", input), ("kernel_map", kernel_map)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
        if tensor.layout != torch.strided:
            raise TypeError(f"{name} must be a strided (dense) tensor, got {tensor.layout}")
        if tensor.dtype not in DTYPES:
            raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}")


def under_autocast(input: Tensor, kernel_map: Tensor) -> tuple[Tensor, Tensor]:
    """Casts both to the autocast dtype where autocast is active, as conv2d does; float64 stays."""
    device = input.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return input, kernel_map
    dtype = torch.get_autocast_dtype(device)
    return tuple(t if t.dtype == torch.float64 else t.to(dtype) for t in (input, kernel_map))  # type: ignore[return-value]


def check_same_kind(input: Tensor, kernel_map: Tensor) -> None:
    """Raises TypeError for different dtypes, ValueError for different devices."""
    if input.dtype != kernel_map.dtype:
        raise TypeError(f"input and kernel_map must have one dtype, got {input.dtype} and {kernel_map.dtype}")
    if input.device != kernel_map.device:
        raise ValueError(f"input and kernel_map must be on one device, got {input.device} and {kernel_map.device}")


def _check_shapes(input: Sequence[int], kernel_map: Sequence[int]) -> None:
    shapes = f"input {list(input)}, kernel_map {list(kernel_map)}"
    if input[0] != kernel_map[0]:
        raise ValueError(
            f"input and kernel_map must have one batch size, got {input[0]} and {kernel_map[0]} ({shapes})"
        )
    channels, groups = input[1], kernel_map[1]
    if channels == 0 or groups == 0 or channels % groups != 0:
        raise ValueError(
            f"kernel_map's groups (axis 1) must divide input's channels (axis 1), got {groups} groups for {channels} "
            f"channels ({shapes})"
        )
    if any(size == 0 for size in input[2:]):
        raise ValueError(f"input must have no empty spatial axis ({shapes})")
    if any(size == 0 for size in kernel_map[2:]):
        raise ValueError(f"kernel_map must have no empty kernel or spatial axis ({shapes})")


def per_axis(name: str, value: Ints, dims: int, minimum: int) -> tuple[int, ...]:
    """One int per spatial axis, from an int or a sequence.

    Raises:
        ValueError: `value` is neither, below `minimum` or above 2**31 - 1; the message begins with `name`.
    """
    if type(value) is int and minimum <= value <= LARGEST:
        return (value,) * dims  # the common case
    values = tuple(value) if isinstance(value, Iterable) else (value,)
    if len(values) == 1:
        values *= dims
    if len(values) != dims or not all(
        isinstance(v, Integral | torch.SymInt) and not isinstance(v, bool) for v in values
    ):
        raise ValueError(f"{name} must be an int or {dims} ints, got {value!r}")
    if any(v < minimum for v in values):
        raise ValueError(f"{name} must be at least {minimum}, got {value!r}")
    if any(v > LARGEST for v in values):
        raise ValueError(f"{name} must be at most {LARGEST}, got {value!r}")
    return tuple(v if isinstance(v, int | torch.SymInt) else int(v) for v in values)


def _sides(
    padding: Padding, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> list[tuple[int, int]]:
    """The left and right padding per axis, from any form that `padding` may have."""
    if isinstance(padding, str) and padding == "valid":
        padding = 0
    if isinstance(padding, str) and padding == "same":
        if any(s > 1 for s in stride):
            raise ValueError(f'padding="same" needs stride 1, got stride {list(stride)}')
        return same_padding(kernel, dilation)
    if isinstance(padding, str):
        raise ValueError(f'padding must be an int, {len(kernel)} ints, "same" or "valid", got {padding!r}')
    return [(p, p) for p in per_axis("padding", padding, len(kernel), 0)]
