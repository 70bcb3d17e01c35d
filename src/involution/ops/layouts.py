"""Memory formats: which one a tensor has, the permutations between them, and the allocation of results."""

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor


def is_channels_last(image: Tensor) -> bool:
    """Whether an [N, C, *S] tensor is stored as [N, *S, C], and not as [N, C, *S] at the same time."""
    return not image.is_contiguous() and is_stored_channels_last(image)


def is_stored_channels_last(image: Tensor) -> bool:
    """Whether an [N, C, *S] tensor is stored as [N, *S, C]; size-1 axes may make it contiguous as well."""
    if image.dim() == 4:
        return image.is_contiguous(memory_format=torch.channels_last)
    return image.movedim(1, -1).is_contiguous()


@cache
def memory_order(role: str, dims: int) -> tuple[int, ...]:
    """The permutation from a role's logical axes to its channels-last memory order.

    [N, C, *S] -> [N, *S, C], and the kernel map [N, G, *K, *O] -> [N, *O, G, *K]: the memory of a channels-last 1x1
    convolution's result with G * prod(K) channels.
    """
    if role == "kernel_map":
        return (0, *range(2 + dims, 2 + 2 * dims), 1, *range(2, 2 + dims))
    return (0, *range(2, 2 + dims), 1)


def allocate(role: str, size: Sequence[int], like: Tensor, channels_last: bool | None = None) -> Tensor:
    """An uninitialised result of this role: channels-last exactly if `like` (an image) is and is not also contiguous.

    Kernels and fakes both call this, so that their strides agree. `channels_last` overrides the layout of `like`.
    """
    if not (is_channels_last(like) if channels_last is None else channels_last):
        return torch.empty(tuple(size), dtype=like.dtype, device=like.device)
    order = memory_order(role, like.dim() - 2)
    return torch.empty_permuted(tuple(size), order, dtype=like.dtype, device=like.device)


@cache
def logical_order(role: str, dims: int) -> tuple[int, ...]:
    """The inverse of `memory_order`: from channels-last memory order to the logical axes."""
    order = memory_order(role, dims)
    return tuple(order.index(axis) for axis in range(len(order)))


def in_layout(channels_last: bool, role: str, result: Tensor) -> Tensor:
    """A result of this role in the memory layout that `allocate` gives it."""
    if not channels_last:
        return result.contiguous()
    dims = result.dim() - 2 if role != "kernel_map" else result.dim() // 2 - 1
    return result.permute(memory_order(role, dims)).contiguous().permute(logical_order(role, dims))


def map_is_channels_last(kernel_map: Tensor, image: Tensor) -> bool:
    """Whether a kernel map is stored as [N, *O, G, *K]; if it is stored both ways, or neither, the image decides."""
    channels_last = kernel_map.permute(memory_order("kernel_map", image.dim() - 2)).is_contiguous()
    if channels_last != kernel_map.is_contiguous():
        return channels_last
    return is_channels_last(image)
