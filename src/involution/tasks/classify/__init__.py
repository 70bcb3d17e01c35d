"""Image classification: the Lightning module, the data, and the recipes."""

from .cifar import CIFAR10, CIFAR100
from .data import ClassificationData
from .digits import Digits
from .image_folder import ImageFolder
from .imagenet import ImageNet, Imagenette
from .module import Classifier
from .shards import Shards

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
