"""Bilateral filtering in 3d: smooths a volume and preserves its surfaces.

    python examples/volume.py                        prints the error before and after

Every voxel's kernel weights its 5x5x5 window by distance and similarity. The differences are products of each window
with its centre, the operator's map `correlate`: nothing is unfolded, which would take 125 times the volume.
"""

import sys

import torch
from photo import options, say_time
from torch import Tensor

from involution import involution3d
from involution.ops.arguments import same_padding
from involution.ops.functional import correlate


def bilateral(volume: Tensor, kernel_size: int = 5, sigma_space: float = 1.5, sigma_range: float = 0.2) -> Tensor:
    """Averages every voxel's window, weighted by distance and similarity.

    Args:
        volume: [N, C, D, H, W]; similarity is over all channels.
        kernel_size: of the window, odd.
        sigma_space: in voxels.
        sigma_range: in the volume's units.

    Returns:
        The same shape.
    """
    kernel, ones = (kernel_size,) * 3, (1, 1, 1)
    window = (kernel, ones, same_padding(kernel, ones), ones)
    square = volume.square().sum(1, keepdim=True)
    unit = torch.ones_like(square)
    difference = square[:, :, None, None, None] - 2 * correlate(volume, volume, 1, *window)
    difference = difference + correlate(unit, square, 1, *window)
    offsets = (torch.arange(kernel_size, dtype=volume.dtype) - kernel_size // 2).square()
    distance = offsets[:, None, None] + offsets[:, None] + offsets
    kernels = torch.exp(-difference / (2 * sigma_range**2) - distance[..., None, None, None] / (2 * sigma_space**2))
    return involution3d(volume, kernels, padding="same") / involution3d(unit, kernels, padding="same")


def ball(size: int) -> Tensor:
    """A ball of ones in a cube of zeros: [1, 1, size, size, size]."""
    axis = torch.linspace(-1, 1, size)
    inside = axis[:, None, None] ** 2 + axis[:, None] ** 2 + axis**2 < 0.5
    return inside.float()[None, None]


def main(arguments: list[str]) -> None:
    """Filters a noisy ball."""
    options(__doc__, arguments)
    torch.manual_seed(0)
    clean = ball(64)
    noisy = clean + 0.1 * torch.randn_like(clean)
    found = bilateral(noisy, sigma_range=0.4)
    for name, one in (("noisy", noisy), ("bilateral", found)):
        print(f"{name}: off by {float((one - clean).square().mean().sqrt()):.4f}")
    say_time(lambda: bilateral(noisy, sigma_range=0.4))


if __name__ == "__main__":
    main(sys.argv[1:])
