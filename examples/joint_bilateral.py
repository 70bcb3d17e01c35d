"""Joint bilateral upsampling: a coarse map made fine by a photo (Kopf et al., SIGGRAPH 2007).

    python examples/joint_bilateral.py [PHOTO]       writes runs/examples/joint_bilateral.png

Every fine pixel averages the coarse values around it, weighted by their distance and by how like the photo is there:
a kernel of its own for every pixel, on a grid that is `scale` times finer than what it reads. Without a photo it takes
scikit-learn's "china" (CC BY 2.0, danielbuechele); the coarse map is its luminance's colours, a sixteenth as wide.
"""

import sys

import torch
from photo import before_and_after, load, say_time
from torch import Tensor
from torch.nn import functional as F

from involution import involution2d
from involution.ops.functional import correlate, same_padding


def nearest(x: Tensor, scale: int) -> Tensor:
    """Every value `scale` times along both axes: [N, C, h, w] -> [N, C, scale * h, scale * w]."""
    return F.interpolate(x, scale_factor=scale, mode="nearest")


def joint_bilateral_upsample(
    coarse: Tensor, guide: Tensor, kernel_size: int = 5, sigma_space: float = 1.0, sigma_range: float = 0.1
) -> Tensor:
    """Upsamples to the guide's size.

    Read at steps of `scale`, the nearest neighbours' copy of the coarse map is the coarse map itself: so this is an
    involution with dilation. The squared differences of the guide, |a - b|^2 = |a|^2 - 2ab + |b|^2, are products of
    every window with its middle, which is the map `correlate`; nothing is unfolded.

    Args:
        coarse: [N, C, h, w].
        guide: [N, D, scale * h, scale * w].
        kernel_size: of the window of coarse pixels, odd.
        sigma_space: of the distance, in coarse pixels.
        sigma_range: of the guide's difference.

    Returns:
        [N, C, scale * h, scale * w].
    """
    scale = guide.shape[-1] // coarse.shape[-1]
    low = nearest(F.avg_pool2d(guide, scale), scale)
    window = ((kernel_size,) * 2, (1, 1), same_padding((kernel_size,) * 2, (scale,) * 2), (scale,) * 2)
    square = low.square().sum(1, keepdim=True)
    products = correlate(guide, low, 1, *window)
    squares = correlate(torch.ones_like(square), square, 1, *window)
    difference = guide.square().sum(1)[:, None, None, None] - 2 * products + squares
    offsets = torch.arange(kernel_size, dtype=guide.dtype, device=guide.device) - kernel_size // 2
    # A fine pixel's place within its coarse one moves the middle of its window.
    places = (torch.arange(scale, dtype=guide.dtype, device=guide.device) + 0.5) / scale - 0.5
    rows, columns = (places.repeat(size // scale) for size in guide.shape[-2:])
    distance = (offsets[:, None] - rows)[:, None, :, None] ** 2 + (offsets[:, None] - columns)[None, :, None] ** 2
    kernels = torch.exp(-distance / (2 * sigma_space**2) - difference / (2 * sigma_range**2))
    options = {"padding": window[2][0][0], "dilation": scale}
    total = involution2d(torch.ones_like(square), kernels, **options)
    return involution2d(nearest(coarse, scale), kernels, **options) / total


def main(arguments: list[str]) -> None:
    """A photo's colours, a sixteenth as wide, follow its grey levels."""
    image = load(arguments[0] if arguments else "china.jpg")
    height, width = (side // 16 * 16 for side in image.shape[-2:])
    image = image[..., :height, :width]
    grey = image.mean(1, keepdim=True)
    coarse = F.avg_pool2d(image, 16)
    fine = joint_bilateral_upsample(coarse, grey)
    before_and_after("joint_bilateral", nearest(coarse, 16), fine, image)
    say_time(lambda: joint_bilateral_upsample(coarse, grey))


if __name__ == "__main__":
    main(sys.argv[1:])
