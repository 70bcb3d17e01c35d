"""Spatially varying blur: every pixel has a Gaussian kernel of its own width, like the blur of a lens.

    python examples/varying_blur.py [PHOTO]          writes runs/examples/varying_blur.png: before and after

The default photo is scikit-learn's "flower" (CC BY 2.0, vultilion).
"""

import sys

import torch
from photo import before_and_after, load, options, say_time
from torch import Tensor

from involution import involution2d


def gaussian_kernels(sigma: Tensor, kernel_size: int) -> Tensor:
    """A Gaussian kernel per position.

    Args:
        sigma: standard deviations in pixels, positive, [N, H, W].
        kernel_size: odd; six times the largest sigma covers the visible part.

    Returns:
        [N, 1, K, K, H, W], not normalised.
    """
    offsets = torch.arange(kernel_size, dtype=sigma.dtype) - kernel_size // 2
    squares = offsets[:, None] ** 2 + offsets**2
    return torch.exp(-squares[..., None, None] / (2 * sigma[:, None, None] ** 2))[:, None]


def blur(image: Tensor, sigma: Tensor, kernel_size: int) -> Tensor:
    """Averages each pixel's window with its Gaussian's weights, normalised over the part inside the image.

    Args:
        image: [N, C, H, W].
        sigma: see `gaussian_kernels`.
        kernel_size: see `gaussian_kernels`.
    """
    kernels = gaussian_kernels(sigma, kernel_size)
    weights = involution2d(torch.ones_like(image[:, :1]), kernels, padding="same")
    return involution2d(image, kernels, padding="same") / weights


def main(arguments: list[str]) -> None:
    """Blurs a photo towards its borders."""
    image = load(options(__doc__, arguments, "flower.jpg").photo)
    height, width = image.shape[-2:]
    y, x = torch.linspace(-1, 1, height)[:, None], torch.linspace(-1, 1, width)
    sigma = 0.05 + 5 * (x**2 + y**2).clamp(0.05, 1)
    before_and_after("varying_blur", image, blur(image, sigma[None], 31))
    say_time(lambda: blur(image, sigma[None], 31))


if __name__ == "__main__":
    main(sys.argv[1:])
