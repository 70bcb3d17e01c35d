"""The preprocessing of images and masks, in training and in evaluation."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import adjust_hue
from torchvision.tv_tensors import Image, Mask

IGNORED = 255  # in masks: pixels without a class, which neither loss nor scores use


def height_and_width(size: tuple[int, int] | int) -> tuple[int, int]:
    """Height and width; one number means a square."""
    return (size, size) if isinstance(size, int) else size


class RandomCrop(v2.Transform):
    """Cuts out a random rectangle; one in which a single class covers too much is rejected, up to nine times.

    Where the image is shorter than `size`, its whole length is kept.

    Args:
        size: height and width.
        max_share: of a single class among the crop's pixels that are not ignored; 1 accepts the first crop.
    """

    def __init__(self, size: Sequence[int], max_share: float) -> None:
        super().__init__()
        self.size, self.max_share = tuple(size), max_share

    def make_params(self, flat_inputs: list[Any]) -> dict[str, int]:
        """Top, left, height and width of the crop."""
        masks = [one for one in flat_inputs if isinstance(one, Mask)]
        whole = v2.functional.get_size(flat_inputs[0])
        for _ in range(10 if self.max_share < 1 else 1):
            params = self._rectangle(whole)
            if all(self._largest_share(mask, params) <= self.max_share for mask in masks):
                break
        return params

    def _rectangle(self, whole: Sequence[int]) -> dict[str, int]:
        height, width = (min(*pair) for pair in zip(self.size, whole, strict=True))
        top, left = (
            int(torch.randint(0, full - part + 1, ())) for full, part in zip(whole, (height, width), strict=True)
        )
        return {"top": top, "left": left, "height": height, "width": width}

    def _largest_share(self, mask: Mask, params: dict[str, int]) -> float:
        ids = v2.functional.crop(mask, **params).as_subclass(Tensor)
        counts = ids[ids != IGNORED].long().bincount()
        return float(counts.max() / counts.sum()) if counts.numel() else 1.0

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """The part of an image [3, H, W] or a mask [H, W]."""
        return v2.functional.crop(inpt, **params)


class PhotometricDistortion(v2.Transform):
    """Four changes of an image, each with probability 1/2, as in SSD and the published segmenters.

    Brightness is added, contrast multiplies, saturation multiplies HSV's, hue rotates; contrast comes with equal
    probability before or after saturation and hue. Values are clamped to 0..255. torchvision's
    RandomPhotometricDistort differs: it multiplies brightness, blends contrast with the mean grey and saturation with
    the grey image, and permutes channels.

    Args:
        brightness: largest absolute offset, of 255.
        contrast: range of the factor.
        saturation: range of the factor.
        hue: largest rotation, in degrees.
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
        """The amount of each change; neutral values for changes that are not applied."""
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
        """Changes an image [3, H, W] uint8; returns anything else unchanged."""
        if not isinstance(inpt, Image):
            return inpt
        x = (inpt.as_subclass(Tensor).float() + params["brightness"]).clamp(0, 255)
        before, after = (params["contrast"], 1.0) if params["contrast_first"] else (1.0, params["contrast"])
        x = saturated((x * before).clamp(0, 255), params["saturation"])
        if params["hue"]:
            x = 255 * adjust_hue(x / 255, params["hue"] / 360)
        return Image((x * after).clamp(0, 255).round().byte())


def saturated(x: Tensor, factor: float) -> Tensor:
    """An image [3, H, W] float whose HSV saturation is multiplied by `factor`, and at most 1."""
    value = x.amax(dim=0, keepdim=True)
    chroma = value - x.amin(dim=0, keepdim=True)
    largest = torch.where(chroma > 0, value / chroma.clamp(min=1e-6), factor)
    return value - (value - x) * largest.clamp(max=factor)


class Preprocessing(NamedTuple):
    """The preprocessing of validation, testing and prediction; plain values, which a checkpoint stores.

    The shorter side is resized to `resize` pixels (bilinear, antialiased), and each channel to (x - mean) / std of x in
    0..1. Masks and predictions have the size of the file: logits are resized back.
    """

    resize: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def evaluation(self) -> v2.Transform:
        """The transform: PIL image -> [3, h, w] float32."""
        return v2.Compose([v2.ToImage(), v2.Resize(self.resize), *self._to_float(), v2.ToPureTensor()])

    def training(
        self, scale: Sequence[float], crop: Sequence[int], max_share: float, flip: float, photometric: bool
    ) -> v2.Transform:
        """The transform of an image and its mask (tv_tensors).

        Args:
            scale: the shorter side is resized to `resize` times a factor from this range.
            crop: height and width of the result; smaller images are padded, last, with 0 (the mean) and IGNORED.
            max_share: of a single class among the crop's known pixels, otherwise another crop is tried; 1 accepts all.
            flip: probability of a horizontal flip.
            photometric: random brightness, contrast, saturation and hue, see `PhotometricDistortion`.
        """
        shorter = [max(1, round(self.resize * factor)) for factor in scale]
        steps: list[v2.Transform] = [
            v2.RandomResize(shorter[0], shorter[1] + 1),
            RandomCrop(crop, max_share),
            v2.RandomHorizontalFlip(flip),
        ]
        if photometric:
            steps.append(PhotometricDistortion())
        # Padded last, as in the published systems, so that photometric changes leave the padding alone.
        padding = v2.RandomCrop(tuple(crop), pad_if_needed=True, fill={Image: 0.0, Mask: IGNORED})
        return v2.Compose([*steps, *self._to_float(), padding, v2.ToPureTensor()])

    def _to_float(self) -> list[v2.Transform]:
        return [v2.ToDtype({Image: torch.float32, "others": None}, scale=True), v2.Normalize(self.mean, self.std)]
