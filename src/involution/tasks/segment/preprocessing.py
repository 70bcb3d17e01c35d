"""How a photograph and its mask become what a segmenter reads, in training and outside of it."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torchvision.transforms import v2
from torchvision.tv_tensors import Image, Mask

IGNORED = 255  # in masks: pixels that neither train nor count


class Preprocessing(NamedTuple):
    """What validation, testing and prediction do to an image; plain values, which a checkpoint carries.

    The shorter side becomes `resize` pixels (bilinear, antialiased), and every channel becomes (x - mean) / std, of x
    in 0..1. Ids are those of the image's own pixels: logits are resized back.
    """

    resize: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def evaluation(self) -> v2.Transform:
        """The transform: PIL image -> [3, h, w] float32."""
        return v2.Compose([v2.ToImage(), v2.Resize(self.resize), *self._to_float()])

    def training(self, scale: Sequence[float], crop: Sequence[int], flip: float, photometric: bool) -> v2.Transform:
        """The transform of an image and its mask (tv_tensors).

        Args:
            scale: the shorter side becomes `resize` times a factor of this range.
            crop: height and width of what is cut out then, or filled up to: with the mean, in masks with IGNORED.
            flip: probability of a flip from left to right.
            photometric: change brightness, contrast, saturation and hue, each with a probability of one half.
        """
        shorter = [max(1, round(self.resize * factor)) for factor in scale]
        fill = {Image: [round(255 * value) for value in self.mean], Mask: IGNORED}
        steps: list[v2.Transform] = [
            v2.RandomResize(shorter[0], shorter[1] + 1),
            v2.RandomCrop(tuple(crop), pad_if_needed=True, fill=fill),
            v2.RandomHorizontalFlip(flip),
        ]
        if photometric:
            kinds = ({"brightness": 0.125}, {"contrast": 0.5}, {"saturation": 0.5}, {"hue": 0.05})
            steps += [v2.RandomApply([v2.ColorJitter(**kind)]) for kind in kinds]
        return v2.Compose([*steps, *self._to_float()])

    def _to_float(self) -> list[v2.Transform]:
        return [
            v2.ToDtype({Image: torch.float32, "others": None}, scale=True),
            v2.Normalize(self.mean, self.std),
            v2.ToPureTensor(),
        ]
