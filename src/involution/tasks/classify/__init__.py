"""Image classification: the Lightning module, the data, and the recipes."""

from .cifar10 import CIFAR10
from .data import ClassificationData
from .digits import Digits
from .image_folder import ImageFolder
from .module import Classifier

__all__ = ["CIFAR10", "ClassificationData", "Classifier", "Digits", "ImageFolder"]
