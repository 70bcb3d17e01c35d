"""Semantic segmentation: the models, the Lightning module, the data, and the recipes."""

from .cityscapes import Cityscapes
from .data import SegmentationData
from .folders import CamVid, Folders
from .models import SemanticFPN, UPerNet
from .module import Segmenter
from .voc import VOC, Pets

__all__ = [
    "VOC",
    "CamVid",
    "Cityscapes",
    "Folders",
    "Pets",
    "SegmentationData",
    "Segmenter",
    "SemanticFPN",
    "UPerNet",
]
