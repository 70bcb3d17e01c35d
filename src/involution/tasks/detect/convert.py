"""mmdet 2.x's Faster R-CNN, Mask R-CNN and RetinaNet on RedNet, with the published configurations, into ours.

Two things differ besides the names: mmdet's background is the last class, torchvision's the first; and mmdet counts
RetinaNet's coarser levels among the pyramid's convolutions.
"""

import re
from pathlib import Path
from typing import Any

from torch import Tensor

from ...engine.data import IMAGENET_MEAN, IMAGENET_STD
from ...zoo.checkpoints import body
from ...zoo.identify import identify
from ...zoo.official import count_laterals, fpn_name, involution_name, renamed
from .module import IN_CHECKPOINT, Detector
from .preprocessing import Preprocessing

_ANCHORS = 9  # of RetinaNet, at a position
_MODULES = {
    "rpn_head.rpn_cls": "rpn.head.cls_logits",
    "rpn_head.rpn_reg": "rpn.head.bbox_pred",
    "roi_head.bbox_head.shared_fcs.0": "roi_heads.box_head.fc6",
    "roi_head.bbox_head.shared_fcs.1": "roi_heads.box_head.fc7",
    "roi_head.bbox_head.fc_cls": "roi_heads.box_predictor.cls_score",
    "roi_head.bbox_head.fc_reg": "roi_heads.box_predictor.bbox_pred",
    "roi_head.mask_head.upsample": "roi_heads.mask_predictor.conv5_mask",
    "roi_head.mask_head.conv_logits": "roi_heads.mask_predictor.mask_fcn_logits",
    "bbox_head.retina_cls": "head.classification_head.cls_logits",
    "bbox_head.retina_reg": "head.regression_head.bbox_reg",
}
# Behind the prefix a convolution has weight and bias, an involution what `involution_name` knows.
_CONVOLUTIONS = (
    (re.compile(r"rpn_head\.rpn_conv\.()"), "rpn.head.conv.0.0."),
    (re.compile(r"roi_head\.mask_head\.convs\.(\d+)\.(?:conv\.|0\.)"), "roi_heads.mask_head.{}.0."),
    (re.compile(r"bbox_head\.cls_convs\.(\d+)\.conv\."), "head.classification_head.conv.{}.0."),
    (re.compile(r"bbox_head\.reg_convs\.(\d+)\.conv\."), "head.regression_head.conv.{}.0."),
)

MODULE = Detector  # the class whose arguments `converted` returns


def converted(weights: dict[str, Tensor], file: Path) -> tuple[dict[str, Any], dict[str, Tensor], Preprocessing]:
    """Arguments of `Detector`, its network's tensors, and the preprocessing that the network was trained with.

    Args:
        weights: of mmdet, the backbone's by our names.
        file: their name in errors.

    Raises:
        ValueError: the backbone is no RedNet, or two tensors have the same name.
    """
    laterals = count_laterals(weights)
    ours = renamed(weights, lambda name: _name(name, laterals), file)
    for name in ("weight", "bias"):
        scores = f"roi_heads.box_predictor.cls_score.{name}"
        if scores in ours:
            ours[scores] = ours[scores].roll(1, dims=0)
    return _arguments(ours, file), ours, Preprocessing(800, 1333, IMAGENET_MEAN, IMAGENET_STD)


def _name(name: str, laterals: int) -> str:
    if name.startswith("neck."):
        return f"backbone.fpn.{fpn_name(name.removeprefix('neck.'), laterals)}"
    module, _, tensor = name.rpartition(".")
    if module in _MODULES:
        return f"{_MODULES[module]}.{tensor}"
    for pattern, ours in _CONVOLUTIONS:
        found = pattern.match(name)
        if found:
            return ours.format(found[1]) + involution_name(name[found.end() :])
    return name


def _arguments(weights: dict[str, Tensor], file: Path) -> dict[str, Any]:
    """Of `Detector`."""
    found = identify(body(weights), str(file))
    kwargs = {name: value for name, value in found.arguments.items() if name != "num_classes"}
    arguments: dict[str, Any] = {"backbone": found.name, "backbone_kwargs": kwargs, "backbone_weights": IN_CHECKPOINT}
    arguments["neck"] = _layer(weights, "backbone.fpn.layer_blocks.")
    two_stage = any(name.startswith(("rpn.", "roi_heads.")) for name in weights)
    predictor = "roi_heads.box_predictor.cls_score.bias" if two_stage else "head.classification_head.cls_logits.bias"
    rows = len(weights[predictor]) if predictor in weights else (81 if two_stage else 80 * _ANCHORS)
    if not two_stage:
        return arguments | {"model_name": "retinanet", "num_classes": rows // _ANCHORS}
    masks = any(name.startswith("roi_heads.mask_head.") for name in weights)
    head = _layer(weights, "rpn.head.conv.")
    return arguments | {
        "model_name": "mask_rcnn" if masks else "faster_rcnn",
        "num_classes": rows - 1,
        "head": head,
    }


def _layer(weights: dict[str, Tensor], prefix: str) -> str:
    involution = any(name.startswith(prefix) and ".generator." in name for name in weights)
    return "involution" if involution else "convolution"
