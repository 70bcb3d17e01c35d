"""The front door: involution1d, involution2d and involution3d, with their checks, shape rule and dtype rule."""

from collections.abc import Iterable, Sequence
from functools import lru_cache
from numbers import Integral
from typing import Literal

import torch
from torch import Tensor

from .geometry import DTYPES, LARGEST, MAPS
from .registration import evaluate

Ints = int | Sequence[int]
Padding = Ints | Literal["same", "valid"]

_APPLY, _, _CORRELATE = MAPS


def involution1d(
    input: Tensor, kernel_map: Tensor, stride: Ints = 1, padding: Padding = 0, dilation: Ints = 1
) -> Tensor:
    """Involution over one spatial axis: see :func:`involution2d`.

    Shapes: input [N, C, L] or [C, L]; kernel_map [N, G, K, Lo] or [G, K, Lo]; returns [N, C, Lo] or [C, Lo].
    """
    return _involution(1, input, kernel_map, stride, padding, dilation)


def involution2d(
    input: Tensor, kernel_map: Tensor, stride: Ints = 1, padding: Padding = 0, dilation: Ints = 1
) -> Tensor:
    """Applies to every position its own kernel, shared by the channels of a group (paper, section 3.1).

        y[n, c, i, j] = sum over u, v of k[n, c // (C/G), u, v, i, j] * x[n, c, i*s + u*d - p, j*s + v*d - p]

    Taps outside the input are skipped: an Inf or NaN weight there has no effect, and its gradient is 0.

    Args:
        input: [N, C, H, W] or [C, H, W]; float16, bfloat16, float32 or float64. Any strides; channels_last is fast.
        kernel_map: [N, G, Kh, Kw, Ho, Wo] or [G, Kh, Kw, Ho, Wo], of input's dtype and device; G divides C. Output
            sizes follow torch.nn.functional.conv2d: Ho = (H + 2*padding - dilation*(Kh-1) - 1) // stride + 1.
        stride: an int, or one per spatial axis.
        padding: an int, one per spatial axis, "valid", or "same" (stride 1 only; where the total is odd, the right
            side gets the extra position).
        dilation: an int, or one per spatial axis.

    Returns:
        [N, C, Ho, Wo] (or [C, Ho, Wo]), of input's dtype, or autocast's under autocast; channels_last exactly if the
        input is and is not also contiguous. Half precision accumulates in float32.

    Raises:
        TypeError: an argument is no tensor, a dtype is not one of the four, or the two dtypes differ.
        ValueError: ranks, sizes, devices, groups, stride, padding or dilation do not fit.
    """
    return _involution(2, input, kernel_map, stride, padding, dilation)


def involution3d(
    input: Tensor, kernel_map: Tensor, stride: Ints = 1, padding: Padding = 0, dilation: Ints = 1
) -> Tensor:
    """Involution over three spatial axes: see :func:`involution2d`.

    Shapes: input [N, C, D, H, W] or [C, D, H, W]; kernel_map [N, G, Kd, Kh, Kw, Do, Ho, Wo] or without N; returns
    [N, C, Do, Ho, Wo] or [C, Do, Ho, Wo].
    """
    return _involution(3, input, kernel_map, stride, padding, dilation)


def _involution(dims: int, input: Tensor, kernel_map: Tensor, stride: Ints, padding: Padding, dilation: Ints) -> Tensor:
    _check_tensors(input, kernel_map)
    if input.dim() == dims + 1 and kernel_map.dim() == 2 * dims + 1:
        return _involution(dims, input.unsqueeze(0), kernel_map.unsqueeze(0), stride, padding, dilation).squeeze(0)
    if input.dim() != dims + 2 or kernel_map.dim() != 2 * dims + 2:
        raise ValueError(
            f"involution{dims}d wants input of rank {dims + 2} and kernel_map of rank {2 * dims + 2} (or both without "
            f"the batch), got input {list(input.shape)} and kernel_map {list(kernel_map.shape)}"
        )
    return involve(*_in_full(input, kernel_map, stride, padding, dilation))


def check_call(
    input: Tensor, kernel_map: Tensor, stride: Ints = 1, padding: Padding = 0, dilation: Ints = 1
) -> tuple[Tensor, Tensor]:
    """Checks the arguments of an involution1d, 2d or 3d call without running it.

    Returns:
        The two tensors as a backend would get them: batched, and cast under autocast.

    Raises: as involution2d.
    """
    _check_tensors(input, kernel_map)
    dims = kernel_map.dim() - input.dim()
    if dims not in (1, 2, 3) or input.dim() not in (dims + 1, dims + 2):
        raise ValueError(
            "input and kernel_map must be [N, C, *S] and [N, G, *K, *O] with one to three spatial axes, or both "
            f"without N, got {list(input.shape)} and {list(kernel_map.shape)}"
        )
    return _checked(*_in_full(input, kernel_map, stride, padding, dilation))


def _in_full(
    input: Tensor, kernel_map: Tensor, stride: Ints, padding: Padding, dilation: Ints
) -> tuple[Tensor, Tensor, tuple[int, ...], list[tuple[int, int]], tuple[int, ...]]:
    """A call's arguments in full: batched tensors, and one number (or pair) per spatial axis."""
    dims = kernel_map.dim() - input.dim()
    if input.dim() == dims + 1:
        input, kernel_map = input.unsqueeze(0), kernel_map.unsqueeze(0)
    strides = per_axis("stride", stride, dims, 1)
    dilations = per_axis("dilation", dilation, dims, 1)
    return input, kernel_map, strides, _sides(padding, kernel_map.shape[2 : 2 + dims], strides, dilations), dilations


def involve(
    input: Tensor,
    kernel_map: Tensor,
    stride: Sequence[int],
    padding: Sequence[tuple[int, int]],
    dilation: Sequence[int],
) -> Tensor:
    """Involution with a left and a right padding for every spatial axis; batched tensors only.

    Raises: as involution2d.
    """
    input, kernel_map = _checked(input, kernel_map, stride, padding, dilation)
    size = [input.shape[0], input.shape[1], *kernel_map.shape[2 + len(stride) :]]
    return evaluate(_APPLY, input, kernel_map, size, list(stride), [left for left, _ in padding], list(dilation))


def correlate(
    query: Tensor,
    key: Tensor,
    groups: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[tuple[int, int]],
    dilation: Sequence[int],
) -> Tensor:
    """Products of every position's query with the keys of its window; the gradient of `involve` in its kernel map.

        k[n, g, u, o] = sum over c in group g of query[n, c, o] * key[n, c, o*stride + u*dilation - padding]

    Taps outside the input give 0.

    Args:
        query: ``[N, C, *O]``.
        key: ``[N, C, *S]``, of the same dtype and device.
        groups: G, which divides C.
        kernel_size: K, one number per spatial axis.
        stride: likewise.
        padding: left and right, of every spatial axis.
        dilation: one number per spatial axis.

    Returns:
        ``[N, G, *K, *O]``.

    Raises: as involution2d.
    """
    size = [key.shape[0], groups, *kernel_size, *query.shape[2:]]
    query, key = _under_autocast(query, key)
    _check_kind(query, key)
    _check_window(key.shape, size, tuple(stride), tuple(padding), tuple(dilation))
    return evaluate(_CORRELATE, query, key, size, list(stride), [left for left, _ in padding], list(dilation))


def same_padding(kernel_size: Sequence[int], dilation: Sequence[int]) -> list[tuple[int, int]]:
    """Left and right padding of every axis with which a layer's output has ceil(size / stride) positions."""
    totals = [d * (k - 1) for k, d in zip(kernel_size, dilation, strict=True)]
    return [(total // 2, total - total // 2) for total in totals]


def _checked(
    input: Tensor,
    kernel_map: Tensor,
    stride: Sequence[int],
    padding: Sequence[tuple[int, int]],
    dilation: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """The two tensors, cast under autocast, if they agree with each other and with the window."""
    input, kernel_map = _under_autocast(input, kernel_map)
    _check_kind(input, kernel_map)
    call = input.shape, kernel_map.shape, tuple(stride), tuple(padding), tuple(dilation)
    check = _check_window if torch.compiler.is_compiling() else _check_window_once
    try:
        check(*call)
    except TypeError:  # symbolic sizes cannot be remembered
        _check_window(*call)
    return input, kernel_map


def _check_window(
    input: Sequence[int],
    kernel_map: Sequence[int],
    stride: tuple[int, ...],
    padding: tuple[tuple[int, int], ...],
    dilation: tuple[int, ...],
) -> None:
    """Raises ValueError unless these shapes and this window belong together."""
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


_check_window_once = lru_cache(maxsize=1024)(_check_window)  # calls of the same shapes follow each other


def _check_tensors(input: Tensor, kernel_map: Tensor) -> None:
    for name, tensor in (("input", input), ("kernel_map", kernel_map)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
        if tensor.layout != torch.strided:
            raise TypeError(f"{name} must be a strided (dense) tensor, got {tensor.layout}")
        if tensor.dtype not in DTYPES:
            raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}")


def _under_autocast(input: Tensor, kernel_map: Tensor) -> tuple[Tensor, Tensor]:
    """Both arguments in autocast's dtype where autocast is on, as conv2d has it; float64 is left alone."""
    device = input.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return input, kernel_map
    dtype = torch.get_autocast_dtype(device)
    return tuple(t if t.dtype == torch.float64 else t.to(dtype) for t in (input, kernel_map))  # type: ignore[return-value]


def _check_kind(input: Tensor, kernel_map: Tensor) -> None:
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


def per_axis(name: str, value: Ints, dims: int, least: int) -> tuple[int, ...]:
    """One number per spatial axis, from an int or a sequence.

    Raises:
        ValueError: `value` is neither, below `least` or absurdly large; the message names it.
    """
    if type(value) is int and least <= value <= LARGEST:
        return (value,) * dims  # nearly always
    values = tuple(value) if isinstance(value, Iterable) else (value,)
    if len(values) == 1:
        values *= dims
    if len(values) != dims or not all(
        isinstance(v, Integral | torch.SymInt) and not isinstance(v, bool) for v in values
    ):
        raise ValueError(f"{name} must be an int or {dims} ints, got {value!r}")
    if any(v < least for v in values):
        raise ValueError(f"{name} must be at least {least}, got {value!r}")
    if any(v > LARGEST for v in values):
        raise ValueError(f"{name} must be at most {LARGEST}, got {value!r}")
    return tuple(v if isinstance(v, int | torch.SymInt) else int(v) for v in values)


def _sides(
    padding: Padding, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> list[tuple[int, int]]:
    """Left and right padding of every axis."""
    if isinstance(padding, str) and padding == "valid":
        padding = 0
    if isinstance(padding, str) and padding == "same":
        if any(s > 1 for s in stride):
            raise ValueError(f'padding="same" wants stride 1, got stride {list(stride)}')
        return same_padding(kernel, dilation)
    if isinstance(padding, str):
        raise ValueError(f'padding must be an int, {len(kernel)} ints, "same" or "valid", got {padding!r}')
    return [(p, p) for p in per_axis("padding", padding, len(kernel), 0)]
