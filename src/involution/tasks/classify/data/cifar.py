"""CIFAR-10 and CIFAR-100, as torchvision downloads them or as a pair of npz files of JPEG images."""

from collections.abc import Sequence
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torchvision import datasets
from torchvision.transforms import v2

from involution.engine.images import read_image

from ..preprocessing import Preprocessing
from .base import ClassificationData, TensorImages, stratified_split

# In torchvision's order.
# fmt: off
_CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_CIFAR100 = (
    "apple", "aquarium_fish", "baby", "bear", "beaver", "bed", "bee", "beetle", "bicycle", "bottle", "bowl", "boy",
    "bridge", "bus", "butterfly", "camel", "can", "castle", "caterpillar", "cattle", "chair", "chimpanzee", "clock",
    "cloud", "cockroach", "couch", "crab", "crocodile", "cup", "dinosaur", "dolphin", "elephant", "flatfish",
    "forest", "fox", "girl", "hamster", "house", "kangaroo", "keyboard", "lamp", "lawn_mower", "leopard", "lion",
    "lizard", "lobster", "man", "maple_tree", "motorcycle", "mountain", "mouse", "mushroom", "oak_tree", "orange",
    "orchid", "otter", "palm_tree", "pear", "pickup_truck", "pine_tree", "plain", "plate", "poppy", "porcupine",
    "possum", "rabbit", "raccoon", "ray", "road", "rocket", "rose", "sea", "seal", "shark", "shrew", "skunk",
    "skyscraper", "snail", "snake", "spider", "squirrel", "streetcar", "sunflower", "sweet_pepper", "table", "tank",
    "telephone", "television", "tiger", "tractor", "train", "trout", "tulip", "turtle", "wardrobe", "whale",
    "willow_tree", "wolf", "woman", "worm",
)
# fmt: on


class CIFAR10(ClassificationData):
    """CIFAR-10: 45,000 training, 5,000 validation (held out of the training images) and 10,000 test images, 32x32.

    `root` holds either torchvision's download (the folder cifar-10-batches-py) or train.npz and test.npz (see
    `read_npz`); where both are, the npz files. Training images are cropped at random after padding by 4, and flipped.

    Args:
        root: folder of the files.
        download: download torchvision's original (170 MB) into `root` if it is missing.
        batch_size: images per batch (per process).
        num_workers: loader workers per loader; None shares the machine's cores among its training processes.
        val_size: images held out for validation, stratified by class.

    Raises:
        FileNotFoundError: `root` holds neither form (at setup).
        ValueError: an npz file does not fit (at setup).
    """

    dataset: ClassVar[Any] = datasets.CIFAR10
    classes: Sequence[str] = _CIFAR10
    preprocessing = Preprocessing(32, 32, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))  # of the training images

    def __init__(
        self,
        root: str,
        download: bool = False,
        batch_size: int = 128,
        num_workers: int | None = None,
        val_size: int = 5000,
    ) -> None:
        super().__init__(batch_size, num_workers)
        self.root, self.download, self.val_size = Path(root), download, val_size

    def prepare_data(self) -> None:
        """Downloads the data if `download` is set."""
        if self.download:
            self.dataset(self.root, download=True)

    def setup(self, stage: str) -> None:
        """Reads the images of the stage: training and validation, or test."""
        plain = self.preprocessing.evaluation()
        if stage in ("fit", "validate"):
            images, labels = self._read("train")
            train, val = stratified_split(labels, self.val_size)
            augmented = self.preprocessing.after(v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip())
            self.train_set = TensorImages(images[train], labels[train], augmented)
            self.val_set = TensorImages(images[val], labels[val], plain)
        else:
            images, labels = self._read("test")
            self.test_set = TensorImages(images, labels, plain)

    def _read(self, part: str) -> tuple[Tensor, Tensor]:
        npz = self.root / f"{part}.npz"
        if npz.is_file():
            images, labels = read_npz(npz)
            if len(labels) == 0 or not 0 <= int(labels.min()) <= int(labels.max()) < self.num_classes:
                raise ValueError(
                    f"labels of {npz} must be from 0 to {self.num_classes - 1}, got {labels.unique().tolist()}"
                )
            return images, labels
        if not (self.root / self.dataset.base_folder).is_dir():
            raise FileNotFoundError(
                f"root must hold {npz.name} or {self.dataset.base_folder}/, got {self.root}; "
                "download=true fetches the latter"
            )
        original = self.dataset(self.root, train=part == "train")
        return torch.from_numpy(original.data).permute(0, 3, 1, 2), torch.tensor(original.targets)


class CIFAR100(CIFAR10):
    """CIFAR-100: 100 classes, 45,000 training, 5,000 validation and 10,000 test images; otherwise as `CIFAR10`."""

    dataset = datasets.CIFAR100
    classes = _CIFAR100
    preprocessing = Preprocessing(32, 32, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))


def read_npz(file: Path) -> tuple[Tensor, Tensor]:
    """Decodes an npz file of JPEG images with a common header.

    Image i is the bytes `header` + `data`[`offsets`[i] : `offsets`[i + 1]] and has the class `labels`[i].

    Returns:
        Images [N, 3, H, W] uint8 and labels [N] int64.

    Raises:
        ValueError: the file lacks one of these arrays, or an image cannot be read.
    """
    with np.load(file) as arrays:
        missing = sorted({"header", "data", "offsets", "labels"} - set(arrays))
        if missing:
            raise ValueError(f"{file} must hold header, data, offsets and labels, but lacks {', '.join(missing)}")
        header, data, offsets = arrays["header"], arrays["data"], arrays["offsets"]
        labels = torch.from_numpy(arrays["labels"].astype(np.int64))
    if len(offsets) != len(labels) + 1:
        raise ValueError(f"{file}: offsets must be one more than labels, got {len(offsets)} and {len(labels)}")
    start = header.tobytes()
    images = [
        np.asarray(read_image(BytesIO(start + data[first:last].tobytes()), f"{file}: image {index}"))
        for index, (first, last) in enumerate(pairwise(offsets))
    ]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2), labels
