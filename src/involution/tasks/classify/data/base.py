"""The base of the classification data modules: a data set in memory, and a stratified split."""

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
    """A data module whose loaders yield (images [N, 3, H, W] float32, labels [N] int64)."""

    preprocessing: Preprocessing


def stratified_split(labels: Tensor, held_out: int | float) -> tuple[Tensor, Tensor]:
    """Splits indices at random, with a fixed seed, so that both parts have the same class shares.

    Args:
        labels: [N].
        held_out: size of the second part, a number or a fraction of N.

    Returns:
        Indices of the first and the second part, int64.
    """
    kept, held = train_test_split(
        torch.arange(len(labels)).numpy(), test_size=held_out, stratify=labels.numpy(), random_state=0
    )
    return torch.from_numpy(kept), torch.from_numpy(held)
