"""Semantic segmentation: the models, the Lightning module, the data, and the recipes."""

from .data.base import SegmentationData
from .data.camvid import CamVid
from .data.cityscapes import Cityscapes
from .data.folders import Folders
from .data.pets import Pets
from .data.voc import VOC
from .models import SemanticFPN, UPerNet
from .module import Segmenter

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
