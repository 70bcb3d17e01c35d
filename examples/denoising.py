"""Kernel-predicting denoising (Bako et al., SIGGRAPH 2017): a network predicts each pixel's averaging weights.

    python examples/denoising.py [PHOTO]             writes runs/examples/denoising.png: noisy, denoised, clean

The network predicts no colours, only weights that sum to one. It is trained for about a minute and a half on crops of
one photo (scikit-learn's "flower", CC BY 2.0, vultilion) and evaluated on another ("china", CC BY 2.0, danielbuechele),
with noise of standard deviation 0.1, against the best Gaussian blur.
"""

import sys

import torch
from photo import before_and_after, load, options, say_time
from torch import Tensor, nn
from torch.nn import functional as F
from varying_blur import blur

from involution import Involution2d
from involution.nn import SoftmaxGenerator

NOISE = 0.1
STEPS = 1500


class Denoiser(nn.Module):
    """An involution of the image by kernels that are generated from convolutional features.

    Args:
        kernel_size: of the averaging window.
        width: of the features.

    Shapes: [N, 3, H, W] -> [N, 3, H, W].
    """

    def __init__(self, kernel_size: int = 7, width: int = 32) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, width, 3, padding=1)]
        for _ in range(3):
            layers += [nn.ReLU(), nn.Conv2d(width, width, 3, padding=1)]
        generator = SoftmaxGenerator(
            width, (kernel_size,) * 2, groups=1, stride=(1, 1), dilation=(1, 1), norm_layer=lambda _: nn.Identity()
        )
        self.average = Involution2d(
            3, kernel_size, group_channels=3, kernel_generator=nn.Sequential(*layers, nn.ReLU(), generator)
        )

    def forward(self, image: Tensor) -> Tensor:
        """[N, 3, H, W] -> [N, 3, H, W]."""
        result: Tensor = self.average(image)
        return result


def decibels(image: Tensor, clean: Tensor) -> float:
    """The peak signal-to-noise ratio."""
    return -10 * float(F.mse_loss(image.clamp(0, 1), clean).log10())


def main(arguments: list[str], steps: int = STEPS) -> dict[str, float]:
    """Trains and compares; returns PSNR in decibels."""
    torch.manual_seed(0)
    source, clean = load("flower.jpg"), load(options(__doc__, arguments, "china.jpg").photo)
    model = Denoiser().to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    for _ in range(steps):
        places = [torch.randint(0, side - 64, (8,)).tolist() for side in source.shape[-2:]]
        crops = torch.cat([source[..., t : t + 64, s : s + 64] for t, s in zip(*places, strict=True)])
        loss = F.l1_loss(model(crops + NOISE * torch.randn_like(crops)), crops)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    noisy = clean + NOISE * torch.randn_like(clean)
    with torch.no_grad():
        found = model.eval()(noisy)
    sigmas = [torch.full(clean[:, 0].shape, sigma) for sigma in (0.5, 0.75, 1.0, 1.25, 1.5)]
    scores = {
        "noisy": decibels(noisy, clean),
        "best Gaussian blur": max(decibels(blur(noisy, sigma, 9), clean) for sigma in sigmas),
        "kernel prediction": decibels(found, clean),
    }
    print(", ".join(f"{name} {value:.2f} dB" for name, value in scores.items()))
    before_and_after("denoising", noisy, found, clean)
    say_time(lambda: model(noisy))
    return scores


if __name__ == "__main__":
    main(sys.argv[1:])
