"""scikit-learn's handwritten digits: 1,797 real scans, part of the package."""

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import v2

from ..preprocessing import Preprocessing
from .base import ClassificationData, TensorImages, stratified_split


class Digits(ClassificationData):
    """1,797 handwritten digits of 8x8 pixels, as 32x32 images with three equal channels.

    A scan is upscaled to 24x24 (bilinear) inside a background margin of 4 pixels. Three channels allow the models for
    CIFAR-10, unchanged. The test set is the fifth that train_test_split(test_size=0.2, stratify=y, random_state=0)
    holds out (360 images); `val_fraction` of the other 1,437 is the validation set. Training images are shifted,
    rotated, and scaled by up to a tenth.

    Args:
        batch_size: images per batch.
        num_workers: loader workers; the images are in memory, so 0 is fastest.
        val_fraction: fraction of the 1,437 images outside the test set.
        shift: largest shift in pixels at 32x32; 3 are one pixel of the scan.
        rotation: largest rotation in degrees.
    """

    classes = tuple("0123456789")
    preprocessing = Preprocessing(32, 32, (0.172,) * 3, (0.283,) * 3)  # of the upscaled training images

    def __init__(
        self,
        batch_size: int = 32,
        num_workers: int = 0,
        val_fraction: float = 0.1,
        shift: int = 3,
        rotation: float = 10,
    ) -> None:
        super().__init__(batch_size, num_workers)
        self.val_fraction, self.shift, self.rotation = val_fraction, shift, rotation

    def setup(self, stage: str) -> None:
        """Builds the three sets."""
        images, labels = load_scans()
        rest, test = stratified_split(labels, 0.2)
        train, val = (rest[part] for part in stratified_split(labels[rest], self.val_fraction))
        plain = self.preprocessing.evaluation()
        moved = v2.RandomAffine(
            self.rotation, (self.shift / 32,) * 2, scale=(0.9, 1.1), interpolation=v2.InterpolationMode.BILINEAR
        )
        augmented = self.preprocessing.after(moved)
        self.train_set = TensorImages(images[train], labels[train], augmented)
        self.val_set = TensorImages(images[val], labels[val], plain)
        self.test_set = TensorImages(images[test], labels[test], plain)


def load_scans() -> tuple[Tensor, Tensor]:
    """All scans: images [1797, 3, 32, 32] float32 in 0..1 and labels [1797] int64."""
    bunch = load_digits()
    scans = torch.from_numpy(bunch.images).float()[:, None] / 16  # grey levels 0..16
    # A background pixel first: digits touch the border of their scans and would look cut off.
    images = F.interpolate(F.pad(scans, (1, 1, 1, 1)), (30, 30), mode="bilinear", align_corners=False)
    images = F.pad(images, (1, 1, 1, 1))
    return images.expand(-1, 3, -1, -1), torch.from_numpy(bunch.target).long()
