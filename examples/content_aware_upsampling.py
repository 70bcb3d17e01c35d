"""Content-aware upsampling (CARAFE, Wang et al., ICCV 2019): each output pixel has its own kernel over the input.

    python examples/content_aware_upsampling.py [PHOTO]   writes runs/examples/content_aware_upsampling.png

The kernels are generated from the input features, at the output's resolution. Here the generator is trained for about a
minute, on one photo, to double its size, and compared with nearest and bicubic upsampling. The default photo is
scikit-learn's "china" (CC BY 2.0, danielbuechele).
"""

import sys

import torch
from photo import before_and_after, load, options, say_time
from torch import Tensor, nn
from torch.nn import functional as F

from involution import involution2d

STEPS = 2000


def reassemble(x: Tensor, kernels: Tensor) -> Tensor:
    """CARAFE's reassembly: y[o] = sum over u of k[u, o] * x[floor(o / scale) + u - K // 2].

    After nearest-neighbour upsampling, steps of `scale` are steps of 1 in x: an involution with dilation `scale`.

    Args:
        x: [N, C, h, w].
        kernels: [N, G, K, K, scale * h, scale * w], K odd.

    Returns:
        [N, C, scale * h, scale * w].
    """
    scale, kernel_size = kernels.shape[-1] // x.shape[-1], kernels.shape[2]
    fine = F.interpolate(x, scale_factor=scale, mode="nearest")
    return involution2d(fine, kernels, padding=scale * (kernel_size // 2), dilation=scale)


class Upsample(nn.Module):
    """CARAFE: compress, encode at the input's resolution, pixel-shuffle to the output's, reassemble.

    Args:
        channels: of input and output.
        scale: upsampling factor.
        kernel_size: of the kernels, odd.
        width: of the compressed features.

    Shapes: [N, channels, h, w] -> [N, channels, scale * h, scale * w].
    """

    def __init__(self, channels: int, scale: int = 2, kernel_size: int = 5, width: int = 32) -> None:
        super().__init__()
        self.kernel_size = kernel_size
        self.encode = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, (scale * kernel_size) ** 2, 3, padding=1),
            nn.PixelShuffle(scale),
        )
        last = self.encode[-2]
        nn.init.zeros_(last.weight)  # initialised as nearest-neighbour upsampling
        nn.init.zeros_(last.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, h, w] -> [N, C, scale * h, scale * w]."""
        weights = self.encode(x)
        # CARAFE has a softmax here, for features; sharp edges need negative weights too: a residual on the identity.
        copy = torch.zeros_like(weights[0])
        copy[len(copy) // 2] = 1
        return reassemble(x, (0.1 * weights + copy).unflatten(1, (1, self.kernel_size, self.kernel_size)))


def main(arguments: list[str], steps: int = STEPS) -> dict[str, float]:
    """Trains on crops of a photo and compares on all of it; returns PSNR in decibels."""
    torch.manual_seed(0)
    image = load(options(__doc__, arguments, "china.jpg").photo)
    height, width = (side // 2 * 2 for side in image.shape[-2:])
    image = image[..., :height, :width]
    model = Upsample(3)
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    for _ in range(steps):
        tops, lefts = torch.randint(0, height - 64, (8,)), torch.randint(0, width - 64, (8,))
        crops = [image[0, :, t : t + 64, s : s + 64] for t, s in zip(tops.tolist(), lefts.tolist(), strict=True)]
        fine = torch.stack(crops)
        loss = F.mse_loss(model(F.avg_pool2d(fine, 2)), fine)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    coarse = F.avg_pool2d(image, 2)
    with torch.no_grad():
        found = {
            "nearest": F.interpolate(coarse, scale_factor=2, mode="nearest"),
            "bicubic": F.interpolate(coarse, scale_factor=2, mode="bicubic"),
            "content-aware": model(coarse),
        }
    decibels = {name: -10 * float(F.mse_loss(one.clamp(0, 1), image).log10()) for name, one in found.items()}
    print(", ".join(f"{name} {value:.2f} dB" for name, value in decibels.items()))
    before_and_after("content_aware_upsampling", *found.values(), image)
    say_time(lambda: model(coarse))
    return decibels


if __name__ == "__main__":
    main(sys.argv[1:])
