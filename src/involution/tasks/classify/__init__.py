"""Image classification: the Lightning module, the data, and the recipes."""

from .data.base import ClassificationData
from .data.cifar import CIFAR10, CIFAR100
from .data.digits import Digits
from .data.image_folder import ImageFolder
from .data.imagenet import ImageNet, Imagenette
from .data.shards import Shards
from .module import Classifier

__all__ = [
    "CIFAR10",
    "CIFAR100",
    "ClassificationData",
    "Classifier",
    "Digits",
    "ImageFolder",
    "ImageNet",
    "Imagenette",
    "Shards",
]
