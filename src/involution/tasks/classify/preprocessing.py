"""The preprocessing of images, in training and in evaluation."""

from collections.abc import Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from PIL import Image, ImageOps
from torchvision.transforms import v2


class Preprocessing(NamedTuple):
    """The preprocessing of validation, testing and prediction; plain values, which a checkpoint stores.

    The shorter side is resized to `resize` pixels (bilinear, antialiased), the centre of `image_size` x `image_size` is
    cropped, and each channel becomes (x - mean) / std of x in 0..1.
    """

    image_size: int
    resize: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def evaluation(self) -> v2.Transform:
        """The transform: PIL image or [3, H, W] tensor -> [3, image_size, image_size] float32."""
        return self.after(v2.Resize(self.resize), v2.CenterCrop(self.image_size))

    def after(self, *steps: v2.Transform, last: Sequence[v2.Transform] = ()) -> v2.Transform:
        """The transform with other steps instead of resizing and cropping, and some at the end."""
        to_float = v2.ToDtype(torch.float32, scale=True)
        return v2.Compose([v2.ToImage(), *steps, to_float, v2.Normalize(self.mean, self.std), *last, v2.ToPureTensor()])


def random_crops(
    preprocessing: Preprocessing, auto_augment: str | None = None, random_erasing: float = 0.0
) -> v2.Transform:
    """The training transform of photographs: random crop (area 8 % to 100 %), flip, optional augmentations.

    Args:
        preprocessing: defines size, mean and standard deviation.
        auto_augment: a policy in timm's notation, such as rand-m9-mstd0.5-inc1, augmix-m5 or original.
        random_erasing: probability that a rectangle is replaced by noise.

    Raises:
        ValueError: auto_augment or random_erasing does not fit.
    """
    if not 0 <= random_erasing <= 1:
        raise ValueError(f"random_erasing must be a probability, got {random_erasing!r}")
    steps: list[Any] = [v2.RandomResizedCrop(preprocessing.image_size), v2.RandomHorizontalFlip()]
    if auto_augment is not None:
        steps += [v2.ToPILImage(), _policy(auto_augment, preprocessing), v2.ToImage()]
    return preprocessing.after(
        *steps, last=[v2.RandomErasing(p=random_erasing, value="random")] if random_erasing else []
    )


def _policy(name: str, preprocessing: Preprocessing) -> Any:
    from timm.data import auto_augment

    makers = {
        "rand": auto_augment.rand_augment_transform,
        "augmix": auto_augment.augment_and_mix_transform,
        "3a": auto_augment.auto_augment_transform,
        "original": auto_augment.auto_augment_transform,
        "originalr": auto_augment.auto_augment_transform,
        "v0": auto_augment.auto_augment_transform,
        "v0r": auto_augment.auto_augment_transform,
    }
    kind = name.partition("-")[0]
    if kind not in makers:
        raise ValueError(f"auto_augment must begin with one of {', '.join(makers)}, got {name!r}")
    fill = tuple(round(255 * value) for value in preprocessing.mean)
    translate = int(0.45 * preprocessing.image_size)  # as timm does
    try:
        policy: Any = makers[kind](name, {"translate_const": translate, "img_mean": fill})
    except (AssertionError, ValueError, KeyError) as error:
        raise ValueError(f"auto_augment must be a policy in timm's notation, got {name!r}: {error}") from error
    for operation in policy.ops if hasattr(policy, "ops") else chain.from_iterable(policy.policy):
        if operation.aug_fn is auto_augment.posterize:
            operation.aug_fn = _posterize
    return policy


def _posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    """At full strength timm keeps no bit, which Pillow refuses; here at least one bit is kept."""
    return ImageOps.posterize(image, min(max(bits, 1), 8))
