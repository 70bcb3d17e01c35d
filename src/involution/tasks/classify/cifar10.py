"""CIFAR-10, as torchvision downloads it or as a pair of npz files of JPEG images."""

from io import BytesIO
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import datasets
from torchvision.transforms import v2

from .data import ClassificationData, TensorImages, normalised, stratified_split

_MEAN, _STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)  # of the training images
_CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


class CIFAR10(ClassificationData):
    """CIFAR-10: 45,000 training, 5,000 validation (held out of the training images) and 10,000 test images, 32x32.

    `root` holds either torchvision's download (the folder cifar-10-batches-py) or train.npz and test.npz (see
    `read_npz`); where both are, the npz files. Training images are cropped at random after padding by 4, and flipped.

    Args:
        root: folder of the files.
        download: let torchvision fetch the original (170 MB) into `root` if it is not there.
        batch_size: images per batch (per process).
        num_workers: loading processes per loader.
        val_size: images held out for validation, by class shares.

    Raises:
        FileNotFoundError: `root` holds neither form (at setup).
    """

    def __init__(
        self,
        root: str,
        download: bool = False,
        batch_size: int = 128,
        num_workers: int = 2,
        val_size: int = 5000,
    ) -> None:
        super().__init__(batch_size, num_workers)
        self.root, self.download, self.val_size = Path(root), download, val_size
        self.classes = list(_CLASSES)

    def prepare_data(self) -> None:
        """Downloads, if asked to."""
        if self.download:
            datasets.CIFAR10(self.root, download=True)

    def setup(self, stage: str) -> None:
        """Reads what the stage needs: training and validation, or test."""
        plain = normalised(mean=_MEAN, std=_STD)
        if stage in ("fit", "validate"):
            images, labels = self._read("train")
            train, val = stratified_split(labels, self.val_size)
            augmented = normalised(v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip(), mean=_MEAN, std=_STD)
            self.train_set = TensorImages(images[train], labels[train], augmented)
            self.val_set = TensorImages(images[val], labels[val], plain)
        else:
            images, labels = self._read("test")
            self.test_set = TensorImages(images, labels, plain)

    def _read(self, part: str) -> tuple[Tensor, Tensor]:
        npz = self.root / f"{part}.npz"
        if npz.is_file():
            return read_npz(npz)
        if not (self.root / datasets.CIFAR10.base_folder).is_dir():
            raise FileNotFoundError(
                f"root must hold {npz.name} or {datasets.CIFAR10.base_folder}/, got {self.root}; "
                "download=true fetches the latter"
            )
        original = datasets.CIFAR10(self.root, train=part == "train")
        return torch.from_numpy(original.data).permute(0, 3, 1, 2), torch.tensor(original.targets)


def read_npz(file: Path) -> tuple[Tensor, Tensor]:
    """Decodes an npz file of JPEG images with a common header.

    Image i is the bytes `header` + `data`[`offsets`[i] : `offsets`[i + 1]] and has the class `labels`[i].

    Returns:
        Images [N, 3, H, W] uint8 and labels [N] int64.
    """
    with np.load(file) as arrays:
        header, data, offsets = arrays["header"], arrays["data"], arrays["offsets"]
        labels = torch.from_numpy(arrays["labels"].astype(np.int64))
    start = header.tobytes()
    streams = (BytesIO(start + data[first:last].tobytes()) for first, last in pairwise(offsets))
    images = np.stack([np.asarray(Image.open(stream).convert("RGB")) for stream in streams])
    return torch.from_numpy(images).permute(0, 3, 1, 2), labels
