"""Memory layouts: which one a tensor has, the permutations between them, and the helper that allocates results."""

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor


def is_channels_last(image: Tensor) -> bool:
    """Whether an [N, C, *S] tensor lies in memory as [N, *S, C], and not as [N, C, *S] too."""
    return not image.is_contiguous() and lies_channels_last(image)


def lies_channels_last(image: Tensor) -> bool:
    """Whether an [N, C, *S] tensor lies in memory as [N, *S, C]."""
    if image.dim() == 4:
        return image.is_contiguous(memory_format=torch.channels_last)
    return image.movedim(1, -1).is_contiguous()


@cache
def memory_order(role: str, dims: int) -> tuple[int, ...]:
    """The permutation that takes a tensor of this role to its channels-last memory order.

    [N, C, *S] -> [N, *S, C], and the kernel map [N, G, *K, *O] -> [N, *O, G, *K]: what a channels-last 1x1
    convolution with G * prod(K) outputs leaves behind.
    """
    if role == "kernel_map":
        return (0, *range(2 + dims, 2 + 2 * dims), 1, *range(2, 2 + dims))
    return (0, *range(2, 2 + dims), 1)


def allocate(role: str, size: Sequence[int], like: Tensor, channels_last: bool | None = None) -> Tensor:
    """An uninitialised result of this role: channels-last exactly if `like` (an image) is and is not also contiguous.

    The kernels and their fakes both call this, so that strides never disagree. `channels_last` overrides what `like`
    says of the layout.
    """
    if not (is_channels_last(like) if channels_last is None else channels_last):
        return torch.empty(tuple(size), dtype=like.dtype, device=like.device)
    order = memory_order(role, like.dim() - 2)
    return torch.empty_permuted(tuple(size), order, dtype=like.dtype, device=like.device)


@cache
def logical_order(role: str, dims: int) -> tuple[int, ...]:
    """The permutation that brings a tensor of this role back from its channels-last memory order."""
    order = memory_order(role, dims)
    return tuple(order.index(axis) for axis in range(len(order)))


def map_is_channels_last(kernel_map: Tensor, image: Tensor) -> bool:
    """Whether a kernel map lies in memory as [N, *O, G, *K]; where it lies both ways, or neither, the image says."""
    channels_last = kernel_map.permute(memory_order("kernel_map", image.dim() - 2)).is_contiguous()
    if channels_last != kernel_map.is_contiguous():
        return channels_last
    return is_channels_last(image)
