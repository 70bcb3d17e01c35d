"""Preprocessing of images and their objects for training, evaluation and prediction."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F
from torchvision.tv_tensors import Image


class Preprocessing(NamedTuple):
    """Preprocessing of an image in validation, testing and prediction, as plain values that a checkpoint carries.

    The shorter side is resized to `min_size` pixels, or fewer so that the longer side is at most `max_size` (bilinear,
    not antialiased, as in torchvision), and channels are normalised to (x - mean) / std, x in 0..1. The detector does
    this itself, and returns boxes and masks in the pixels of the image that it was given.
    """

    min_size: int
    max_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def evaluation(self) -> v2.Transform:
        """The transform: PIL image -> [3, H, W] float32 in 0..1; the detector resizes and normalises."""
        return to_tensor()


def to_tensor() -> v2.Transform:
    """PIL image -> [3, H, W] float32 in 0..1."""
    return v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.ToPureTensor()])


class CropOrPad(v2.Transform):
    """A random crop to a square; a side that is too short is padded at the right or at the bottom.

    torchvision's RandomCrop pads both sides, and so moves the image around in the square.

    Args:
        side: of the square, in pixels.
        colour: of the padding of images, RGB in 0..255; masks are padded with 0.
    """

    def __init__(self, side: int, colour: Sequence[int]) -> None:
        super().__init__()
        self.side, self.colour = side, list(colour)

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """The position of the crop, and the padding after it."""
        height, width = v2.query_size(flat_inputs)
        top, left = (int(torch.randint(max(0, length - self.side) + 1, ())) for length in (height, width))
        kept = {"height": min(height, self.side), "width": min(width, self.side)}
        padding = [0, 0, self.side - kept["width"], self.side - kept["height"]]
        return {"crop": {"top": top, "left": left, **kept}, "padding": padding}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Crops and pads an image, boxes or masks."""
        fill = self.colour if isinstance(inpt, Image) else 0
        return F.pad(F.crop(inpt, **params["crop"]), params["padding"], fill=fill)


def training(
    preprocessing: Preprocessing, min_sizes: Sequence[int], jitter: tuple[float, float] | None, flip: float
) -> v2.Transform:
    """The training transform of an image and its boxes, labels and masks.

    Args:
        preprocessing: its max_size bounds the longer side; its mean is the colour of jitter's padding.
        min_sizes: pixels of the shorter side, one of which is chosen at random.
        jitter: large-scale jitter instead (Ghiasi et al. 2021): a random scale from this range, relative to what fits
            into a square of max_size; then a random crop of that square, or padding at the right and at the bottom.
        flip: probability of a horizontal flip.
    """
    steps: list[v2.Transform] = [v2.ToImage(), v2.RandomHorizontalFlip(flip)]
    if jitter is None:
        steps.append(v2.RandomShortestSize(list(min_sizes), preprocessing.max_size, antialias=False))
    else:
        side, colour = preprocessing.max_size, [round(255 * value) for value in preprocessing.mean]
        steps += [v2.ScaleJitter((side, side), jitter, antialias=False), CropOrPad(side, colour)]
    steps += [v2.ClampBoundingBoxes(), v2.SanitizeBoundingBoxes()]
    return v2.Compose([*steps, v2.ToDtype(torch.float32, scale=True), v2.ToPureTensor()])
