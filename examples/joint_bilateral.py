"""Joint bilateral upsampling (Kopf et al., SIGGRAPH 2007): a coarse map upsampled along the edges of a photo.

    python examples/joint_bilateral.py [PHOTO]       writes runs/examples/joint_bilateral.png

Every output pixel averages the coarse values around it, weighted by distance and by the guide's similarity: each pixel
has its own kernel, on a grid `scale` times finer than the input. The default photo is scikit-learn's "china" (CC BY
2.0, danielbuechele); the coarse map is its colours at 1/16 of the width, and the guide its grey levels.
"""

import sys

import torch
from photo import before_and_after, load, options, say_time
from torch import Tensor
from torch.nn import functional as F

from involution import involution2d
from involution.nn import window_softmax
from involution.ops.arguments import same_padding
from involution.ops.functional import correlate


def nearest(x: Tensor, scale: int) -> Tensor:
    """Nearest-neighbour upsampling: [N, C, h, w] -> [N, C, scale * h, scale * w]."""
    return F.interpolate(x, scale_factor=scale, mode="nearest")


def joint_bilateral_upsample(
    coarse: Tensor, guide: Tensor, kernel_size: int = 5, sigma_space: float = 1.0, sigma_range: float = 0.1
) -> Tensor:
    """Upsamples to the guide's size.

    Sampled at steps of `scale`, the nearest-neighbour upsampled map is the coarse map, so this is an involution with
    dilation. The squared differences of the guide, |a - b|^2 = |a|^2 - 2ab + |b|^2, are products of each window with
    its centre: the map `correlate`, without unfolding. Weights that sum to one over the taps inside the map are a
    softmax
        of
    their exponents, which cannot all underflow.

    Args:
        coarse: [N, C, h, w].
        guide: [N, D, scale * h, scale * w].
        kernel_size: of the window, in coarse pixels, odd.
        sigma_space: standard deviation over distance, in coarse pixels.
        sigma_range: standard deviation over the guide's difference.

    Returns:
        [N, C, scale * h, scale * w].
    """
    scale = guide.shape[-1] // coarse.shape[-1]
    low = nearest(F.avg_pool2d(guide, scale), scale)
    kernel, stride, dilation = (kernel_size,) * 2, (1, 1), (scale,) * 2
    padding = same_padding(kernel, dilation)
    square = low.square().sum(1, keepdim=True)
    products = correlate(guide, low, 1, kernel, stride, padding, dilation)
    squares = correlate(torch.ones_like(square), square, 1, kernel, stride, padding, dilation)
    difference = guide.square().sum(1)[:, None, None, None] - 2 * products + squares
    offsets = torch.arange(kernel_size, dtype=guide.dtype, device=guide.device) - kernel_size // 2
    # A fine pixel's offset within its coarse one shifts the centre of its window.
    subpixel = (torch.arange(scale, dtype=guide.dtype, device=guide.device) + 0.5) / scale - 0.5
    rows, columns = (subpixel.repeat(size // scale) for size in guide.shape[-2:])
    distance = (offsets[:, None] - rows)[:, None, :, None] ** 2 + (offsets[:, None] - columns)[None, :, None] ** 2
    exponents = -distance / (2 * sigma_space**2) - difference / (2 * sigma_range**2)
    kernels = window_softmax(exponents, guide.shape[2:], stride, padding, dilation)
    return involution2d(nearest(coarse, scale), kernels, padding=scale * (kernel_size // 2), dilation=scale)


def main(arguments: list[str]) -> None:
    """Upsamples a photo's colours from 1/16 of its width, guided by its grey levels."""
    image = load(options(__doc__, arguments, "china.jpg").photo)
    height, width = (side // 16 * 16 for side in image.shape[-2:])
    image = image[..., :height, :width]
    grey = image.mean(1, keepdim=True)
    coarse = F.avg_pool2d(image, 16)
    fine = joint_bilateral_upsample(coarse, grey)
    before_and_after("joint_bilateral", nearest(coarse, 16), fine, image)
    say_time(lambda: joint_bilateral_upsample(coarse, grey))


if __name__ == "__main__":
    main(sys.argv[1:])
