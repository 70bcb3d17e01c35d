"""Object detection and instance segmentation: the models, the Lightning module, the data, and the recipes."""

from .data.coco import COCO
from .models import faster_rcnn, mask_rcnn, retinanet
from .module import Detector

__all__ = ["COCO", "Detector", "faster_rcnn", "mask_rcnn", "retinanet"]
