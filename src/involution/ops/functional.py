"""The public functions: involution1d, involution2d and involution3d, and `correlate`, which attention is built on."""

from collections.abc import Sequence

from torch import Tensor

from .arguments import (
    Ints,
    Padding,
    check_same_kind,
    check_tensors,
    check_window,
    checked_arguments,
    per_axis_arguments,
    under_autocast,
)
from .geometry import MAPS
from .registration import evaluate

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
    """Applies a different kernel at every position, shared by the channels of a group (paper, section 3.1).

        y[n, c, i, j] = sum over u, v of k[n, c // (C/G), u, v, i, j] * x[n, c, i*s + u*d - p, j*s + v*d - p]

    Taps outside the input are skipped: an Inf or NaN weight there has no effect, and its gradient is 0.

    Args:
        input: [N, C, H, W] or [C, H, W]; float16, bfloat16, float32 or float64. Any strides; channels_last is fast.
        kernel_map: [N, G, Kh, Kw, Ho, Wo] or [G, Kh, Kw, Ho, Wo], of input's dtype and device; G divides C. Output
            sizes follow torch.nn.functional.conv2d: Ho = (H + 2*padding - dilation*(Kh-1) - 1) // stride + 1.
        stride: an int, or one per spatial axis.
        padding: an int, one per spatial axis, "valid", or "same" (stride 1 only; an odd total puts the extra
            position on the right side).
        dilation: an int, or one per spatial axis.

    Returns:
        [N, C, Ho, Wo] (or [C, Ho, Wo]), in input's dtype, or autocast's under autocast; channels_last exactly if the
        input is and is not also contiguous. Half precision accumulates in float32.

    Raises:
        TypeError: an argument is not a tensor, a dtype is not one of the four, or the two dtypes differ.
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
    check_tensors(input, kernel_map)
    if input.dim() == dims + 1 and kernel_map.dim() == 2 * dims + 1:
        return _involution(dims, input.unsqueeze(0), kernel_map.unsqueeze(0), stride, padding, dilation).squeeze(0)
    if input.dim() != dims + 2 or kernel_map.dim() != 2 * dims + 2:
        raise ValueError(
            f"involution{dims}d needs input of rank {dims + 2} and kernel_map of rank {2 * dims + 2} (or both without "
            f"the batch), got input {list(input.shape)} and kernel_map {list(kernel_map.shape)}"
        )
    return involve(*per_axis_arguments(input, kernel_map, stride, padding, dilation))


def involve(
    input: Tensor,
    kernel_map: Tensor,
    stride: Sequence[int],
    padding: Sequence[tuple[int, int]],
    dilation: Sequence[int],
) -> Tensor:
    """Involution of batched tensors, with separate left and right padding per spatial axis.

    Raises: as involution2d.
    """
    input, kernel_map = checked_arguments(input, kernel_map, stride, padding, dilation)
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
    """Dot products of each position's query with the keys in its window: the gradient of `involve` w.r.t. kernel_map.

        k[n, g, u, o] = sum over c in group g of query[n, c, o] * key[n, c, o*stride + u*dilation - padding]

    Taps outside the input give 0.

    Args:
        query: ``[N, C, *O]``.
        key: ``[N, C, *S]``, of the same dtype and device.
        groups: G, which divides C.
        kernel_size: K, one int per spatial axis.
        stride: one int per spatial axis.
        padding: (left, right) per spatial axis.
        dilation: one int per spatial axis.

    Returns:
        ``[N, G, *K, *O]``.

    Raises: as involution2d.
    """
    size = [key.shape[0], groups, *kernel_size, *query.shape[2:]]
    query, key = under_autocast(query, key)
    check_same_kind(query, key)
    check_window(key.shape, size, tuple(stride), tuple(padding), tuple(dilation))
    return evaluate(_CORRELATE, query, key, size, list(stride), [left for left, _ in padding], list(dilation))
