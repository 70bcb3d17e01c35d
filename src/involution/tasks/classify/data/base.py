"""What the classification data modules share: a data set in memory, and a split that keeps class shares."""

from collections.abc import Callable
from typing import Any

import torch
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.utils.data import Dataset

from involution.engine.data import TaskData

from ..preprocessing import Preprocessing

Sample = tuple[Tensor, int]
Transform = Callable[[Any], Tensor]


class TensorImages(Dataset[Sample]):
    """Images [N, C, H, W] and labels [N] held in memory, as (transformed image, label) pairs."""

    def __init__(self, images: Tensor, labels: Tensor, transform: Transform) -> None:
        self.images, self.labels, self.transform = images, labels, transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Sample:
        return self.transform(self.images[index]), int(self.labels[index])


class ClassificationData(TaskData):
    """What has `classes`, the names of the classes, and `preprocessing`, what evaluation does to an image.

    Loaders give (images [N, 3, H, W] float32, labels [N] int64). Checkpoints carry classes and preprocessing.
    """

    preprocessing: Preprocessing


def stratified_split(labels: Tensor, held_out: int | float) -> tuple[Tensor, Tensor]:
    """Splits indices at random, always the same way, so that classes keep their shares.

    Args:
        labels: [N].
        held_out: size of the second part, a count or a fraction of N.

    Returns:
        Indices of the first and the second part, int64.
    """
    kept, held = train_test_split(
        torch.arange(len(labels)).numpy(), test_size=held_out, stratify=labels.numpy(), random_state=0
    )
    return torch.from_numpy(kept), torch.from_numpy(held)
