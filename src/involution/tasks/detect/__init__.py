"""Object detection and instance segmentation."""

from .models import faster_rcnn, mask_rcnn, retinanet

__all__ = ["faster_rcnn", "mask_rcnn", "retinanet"]
