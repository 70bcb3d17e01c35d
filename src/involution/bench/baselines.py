"""Other implementations of involution: unfold, and shifted multiply-adds under torch.compile."""

from collections.abc import Callable

from torch import Tensor, nn

Operator = Callable[[Tensor, Tensor, int], Tensor]  # input, kernel map, stride; padding is K // 2


def unfold(x: Tensor, k: Tensor, stride: int) -> Tensor:
    """im2col: copies every window, multiplies by its kernel and sums; needs K*K times the input's memory."""
    n, groups, size, _, height, width = k.shape
    windows = nn.functional.unfold(x, size, padding=size // 2, stride=stride)
    windows = windows.view(n, groups, x.shape[1] // groups, size * size, height, width)
    return (k.reshape(n, groups, 1, size * size, height, width) * windows).sum(3).view(n, -1, height, width)


def unfold3d(x: Tensor, k: Tensor) -> Tensor:
    """im2col of a volume, at stride 1."""
    groups, size = k.shape[1:3]
    padded = nn.functional.pad(x, [size // 2] * 6)
    windows = padded.unfold(2, size, 1).unfold(3, size, 1).unfold(4, size, 1)  # [N, C, D, H, W, K, K, K]
    kernels = k.movedim((2, 3, 4), (5, 6, 7)).unsqueeze(2)
    return (windows.unflatten(1, (groups, -1)) * kernels).sum((6, 7, 8)).flatten(1, 2)


def shifted(x: Tensor, k: Tensor, stride: int) -> Tensor:
    """One multiply-add of the shifted, zero-padded input per tap, for torch.compile, which fuses all of them."""
    groups, size, _, height, width = k.shape[1:]
    padded = nn.functional.pad(x, [size // 2] * 4).unflatten(1, (groups, -1))
    rows, columns = (height - 1) * stride + 1, (width - 1) * stride + 1
    y: Tensor | None = None
    for u in range(size):
        for v in range(size):
            term = padded[..., u : u + rows : stride, v : v + columns : stride] * k[:, :, u, v].unsqueeze(2)
            y = term if y is None else y + term
    assert y is not None
    return y.flatten(1, 2)


def depthwise(x: Tensor, k: Tensor, stride: int) -> Tensor:
    """torch's depthwise convolution: another operator with the same window, one kernel for all positions."""
    size = k.shape[2]
    weight = k[0, 0, :, :, 0, 0].expand(x.shape[1], 1, size, size)
    return nn.functional.conv2d(x, weight, stride=stride, padding=size // 2, groups=x.shape[1])
