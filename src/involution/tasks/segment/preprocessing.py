"""How a photograph and its mask become what a segmenter reads, in training and outside of it."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torchvision.transforms import v2
from torchvision.tv_tensors import Image, Mask

IGNORED = 255  # in masks: pixels that neither train nor count


def height_and_width(size: tuple[int, int] | int) -> tuple[int, int]:
    """A single number is a square's."""
    return (size, size) if isinstance(size, int) else size


class RandomCrop(v2.RandomCrop):
    """torchvision's, filled up to the size, but drawn again, up to nine times, where one class takes too much of it.

    Args:
        size: height and width.
        fill: of images and masks.
        max_share: a single class's, of the crop's pixels that are not ignored.
    """

    def __init__(self, size: Sequence[int], fill: dict[type, Any], max_share: float) -> None:
        super().__init__(tuple(size), pad_if_needed=True, fill=fill)
        self.max_share = max_share

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Where to cut."""
        params: dict[str, Any] = super().make_params(flat_inputs)
        masks = [one for one in flat_inputs if isinstance(one, Mask)]
        for _ in range(9 if self.max_share < 1 else 0):
            if all(self._largest_share(mask, params) <= self.max_share for mask in masks):
                break
            params = super().make_params(flat_inputs)
        return params

    def _largest_share(self, mask: Mask, params: dict[str, Any]) -> float:
        left, above = params["padding"][:2]  # which come before the mask's own pixels
        top, start = params["top"] - above, params["left"] - left
        rows = slice(max(0, top), max(0, top + params["height"]))
        ids = mask[..., rows, max(0, start) : max(0, start + params["width"])]
        counts = ids[ids != IGNORED].long().bincount()
        return float(counts.max() / counts.sum()) if counts.numel() else 1.0


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

    def training(
        self, scale: Sequence[float], crop: Sequence[int], max_share: float, flip: float, photometric: bool
    ) -> v2.Transform:
        """The transform of an image and its mask (tv_tensors).

        Args:
            scale: the shorter side becomes `resize` times a factor of this range.
            crop: height and width of what is cut out then, or filled up to: with the mean, in masks with IGNORED.
            max_share: of the crop's known pixels that one class may take, or another crop is tried; 1 takes the first.
            flip: probability of a flip from left to right.
            photometric: change brightness, contrast, saturation and hue, each with a probability of one half.
        """
        shorter = [max(1, round(self.resize * factor)) for factor in scale]
        fill = {Image: [round(255 * value) for value in self.mean], Mask: IGNORED}
        steps: list[v2.Transform] = [
            v2.RandomResize(shorter[0], shorter[1] + 1),
            RandomCrop(crop, fill, max_share),
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
