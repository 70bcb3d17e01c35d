"""How a photograph and its mask become what a segmenter reads, in training and outside of it."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import adjust_hue
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


class PhotometricDistortion(v2.Transform):
    """Four changes of an image, each with a probability of one half (SSD's, as the published segmenters have them).

    Brightness is added, contrast multiplies, saturation multiplies that of HSV, hue turns it; contrast comes before
    saturation and hue or, as often, after them. Values stay in range. torchvision's RandomPhotometricDistort multiplies
    brightness, mixes contrast with the mean grey and saturation with the grey image, and exchanges channels.

    Args:
        brightness: at most so much is added or taken away, of 255.
        contrast: range of the factor.
        saturation: range of the factor.
        hue: at most so many degrees.
    """

    def __init__(
        self,
        brightness: float = 32,
        contrast: tuple[float, float] = (0.5, 1.5),
        saturation: tuple[float, float] = (0.5, 1.5),
        hue: float = 36,
    ) -> None:
        super().__init__()
        self.brightness, self.contrast, self.saturation, self.hue = brightness, contrast, saturation, hue

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Amounts by name; those of a change that is not made leave the image as it is."""
        ranges = {
            "brightness": (-self.brightness, self.brightness),
            "contrast": self.contrast,
            "saturation": self.saturation,
            "hue": (-self.hue, self.hue),
        }
        neutral = {"brightness": 0.0, "contrast": 1.0, "saturation": 1.0, "hue": 0.0}
        chosen, places = torch.rand(2, len(ranges)).tolist()
        params = {
            name: low + place * (high - low) if choice < 0.5 else neutral[name]
            for (name, (low, high)), choice, place in zip(ranges.items(), chosen, places, strict=True)
        }
        return params | {"contrast_first": float(torch.rand(())) < 0.5}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """An image [3, H, W] uint8; anything else stays."""
        if not isinstance(inpt, Image):
            return inpt
        x = (inpt.as_subclass(Tensor).float() + params["brightness"]).clamp(0, 255)
        before, after = (params["contrast"], 1.0) if params["contrast_first"] else (1.0, params["contrast"])
        x = saturated((x * before).clamp(0, 255), params["saturation"])
        if params["hue"]:
            x = 255 * adjust_hue(x / 255, params["hue"] / 360)
        return Image((x * after).clamp(0, 255).round().byte())


def saturated(x: Tensor, factor: float) -> Tensor:
    """An image [3, H, W] float whose saturation, as in HSV, is `factor` times what it was, and at most 1."""
    value = x.amax(dim=0, keepdim=True)
    chroma = value - x.amin(dim=0, keepdim=True)
    largest = torch.where(chroma > 0, value / chroma.clamp(min=1e-6), factor)
    return value - (value - x) * largest.clamp(max=factor)


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
            photometric: change brightness, contrast, saturation and hue by chance, see `PhotometricDistortion`.
        """
        shorter = [max(1, round(self.resize * factor)) for factor in scale]
        fill = {Image: [round(255 * value) for value in self.mean], Mask: IGNORED}
        steps: list[v2.Transform] = [
            v2.RandomResize(shorter[0], shorter[1] + 1),
            RandomCrop(crop, fill, max_share),
            v2.RandomHorizontalFlip(flip),
        ]
        if photometric:
            steps.append(PhotometricDistortion())
        return v2.Compose([*steps, *self._to_float()])

    def _to_float(self) -> list[v2.Transform]:
        return [
            v2.ToDtype({Image: torch.float32, "others": None}, scale=True),
            v2.Normalize(self.mean, self.std),
            v2.ToPureTensor(),
        ]
