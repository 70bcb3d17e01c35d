"""scikit-learn's handwritten digits: 1,797 real scans that come with the package."""

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import v2

from ..preprocessing import Preprocessing
from .base import ClassificationData, TensorImages, stratified_split


class Digits(ClassificationData):
    """1,797 handwritten digits of 8x8, shown at 32x32 in three equal channels.

    A scan is upscaled to 24x24 (bilinear) in a margin of 4 pixels of background. Three channels, so that the models
    are those for CIFAR-10, unchanged. The test set is the fifth that train_test_split(test_size=0.2, stratify=y,
    random_state=0) holds out (360 images); a further `val_fraction` of the other 1,437 is the validation set.
    Training images are shifted, rotated, and scaled by up to a tenth.

    Args:
        batch_size: images per batch.
        num_workers: loading processes; the images are in memory, so none is fastest.
        val_fraction: of the 1,437 images that are not tested on.
        shift: at most so many pixels at 32x32, where 3 are one pixel of the scan.
        rotation: at most so many degrees.
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
        """Makes the three sets."""
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
    # A pixel of background first: digits fill their scans to the border and would end there as if cut.
    images = F.interpolate(F.pad(scans, (1, 1, 1, 1)), (30, 30), mode="bilinear", align_corners=False)
    images = F.pad(images, (1, 1, 1, 1))
    return images.expand(-1, 3, -1, -1), torch.from_numpy(bunch.target).long()
