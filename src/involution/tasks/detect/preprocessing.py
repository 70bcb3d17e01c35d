"""How a photograph and its objects become what a detector reads, in training and outside of it."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torchvision.transforms import v2
from torchvision.tv_tensors import Image


class Preprocessing(NamedTuple):
    """What validation, testing and prediction do to an image; plain values, which a checkpoint carries.

    The shorter side becomes `min_size` pixels, or fewer so that the longer one is at most `max_size` (bilinear, not
    antialiased, as in torchvision), and every channel becomes (x - mean) / std, of x in 0..1. The detector does this
    itself, and gives boxes and masks in the pixels of the image that it got.
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


def training(
    preprocessing: Preprocessing, min_sizes: Sequence[int], jitter: tuple[float, float] | None, flip: float
) -> v2.Transform:
    """The training transform of an image and its boxes, labels and masks.

    Args:
        preprocessing: gives the largest longer side, and the mean that fills up what jitter leaves empty.
        min_sizes: of which the shorter side becomes one, by chance.
        jitter: large-scale jitter in its place: a scale from this range, of what fits into a square of the largest
            longer side; then that square is cut out, or filled up.
        flip: probability of a flip from left to right.
    """
    steps: list[v2.Transform] = [v2.ToImage(), v2.RandomHorizontalFlip(flip)]
    if jitter is None:
        steps.append(v2.RandomShortestSize(list(min_sizes), preprocessing.max_size, antialias=False))
    else:
        square = (preprocessing.max_size,) * 2
        fill = [round(255 * value) for value in preprocessing.mean]
        steps.append(v2.ScaleJitter(square, jitter, antialias=False))
        steps.append(v2.RandomCrop(square, pad_if_needed=True, fill={Image: fill, "others": 0}))
    steps += [v2.ClampBoundingBoxes(), v2.SanitizeBoundingBoxes()]
    return v2.Compose([*steps, v2.ToDtype(torch.float32, scale=True), v2.ToPureTensor()])
