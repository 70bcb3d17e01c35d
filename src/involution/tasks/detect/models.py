"""Faster R-CNN, Mask R-CNN and RetinaNet on RedNet, with involution in neck and head (section 4.2).

Labels are 1 to num_classes, 0 is background. Where the neck is of involution, every 3x3 convolution of the pyramid is a
7x7 involution; where the head is, the 3x3 convolutions of the RPN and of the mask head are.
"""

import difflib
import inspect
from functools import partial
from typing import Any

from torch import nn
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads

from ...zoo.fpn import PyramidBackbone, check_layer, involution_layer
from .anchors import RATIOS, Anchors, Matcher
from .rcnn import RCNN
from .rcnn import SCALES as PROPOSAL_SCALES
from .regions import DetectionTransform, ProposalHead
from .retina import SCALES as RETINA_SCALES
from .retina import LabelledRetinaNet, RetinaHead

CHANNELS = 256  # of the pyramid and the heads


def faster_rcnn(
    backbone: str = "rednet50",
    neck: str = "convolution",
    head: str = "convolution",
    num_classes: int = 80,
    frozen_stages: int = 0,
    norm_eval: bool = False,
    backbone_kwargs: dict[str, Any] | None = None,
    **kwargs: Any,
) -> RCNN:
    """Faster R-CNN with FPN.

    Args:
        backbone: a RedNet or ResNet of timm's registry.
        neck: "convolution" or "involution", of the pyramid.
        head: "convolution" or "involution", of the RPN.
        num_classes: without background.
        frozen_stages: see `PyramidBackbone`; the paper has 1, with pretrained weights.
        norm_eval: see `PyramidBackbone`; the paper has True, with pretrained weights.
        backbone_kwargs: further arguments of timm.create_model, such as stem_kernel_size.
        **kwargs: of `RCNN`, with the names of torchvision's FasterRCNN, such as box_detections_per_img.

    Raises:
        ValueError: an argument is unknown or not valid.
    """
    _check_names("faster_rcnn", kwargs, RCNN)
    pyramid, rpn_head = _two_stage(backbone, neck, head, frozen_stages, norm_eval, backbone_kwargs)
    return RCNN(pyramid, rpn_head, num_classes, **kwargs)


def mask_rcnn(
    backbone: str = "rednet50",
    neck: str = "convolution",
    head: str = "convolution",
    num_classes: int = 80,
    frozen_stages: int = 0,
    norm_eval: bool = False,
    backbone_kwargs: dict[str, Any] | None = None,
    **kwargs: Any,
) -> RCNN:
    """Mask R-CNN with FPN; arguments as in `faster_rcnn`, and `head` sets the mask head too."""
    _check_names("mask_rcnn", kwargs, RCNN)
    mask_head = MaskRCNNHeads(CHANNELS, (CHANNELS,) * 4, 1)
    if head == "involution":
        for block in mask_head:
            block[0] = involution_layer(CHANNELS, backbone)
    pyramid, rpn_head = _two_stage(backbone, neck, head, frozen_stages, norm_eval, backbone_kwargs)
    return RCNN(pyramid, rpn_head, num_classes, mask_head, **kwargs)


def retinanet(
    backbone: str = "rednet50",
    neck: str = "convolution",
    num_classes: int = 80,
    frozen_stages: int = 0,
    norm_eval: bool = False,
    backbone_kwargs: dict[str, Any] | None = None,
    head_norm_groups: int | None = None,
    fg_iou_thresh: float = 0.5,
    bg_iou_thresh: float = 0.4,
    detections_per_img: int = 100,
    **kwargs: Any,
) -> RetinaNet:
    """RetinaNet on levels from stride 8 to 128; arguments as in `faster_rcnn`. Its head is of convolutions.

    Args:
        backbone: see `faster_rcnn`, as for the next five arguments.
        neck: likewise.
        num_classes: likewise.
        frozen_stages: likewise.
        norm_eval: likewise.
        backbone_kwargs: likewise.
        head_norm_groups: groups of the head's group norms; None has no norms there, as published. From scratch the head
            hardly learns without norms.
        fg_iou_thresh: minimum IoU of a positive anchor; an object's best anchor is always positive.
        bg_iou_thresh: IoU below which an anchor is negative.
        detections_per_img: maximum number of detections per image.
        **kwargs: of torchvision's RetinaNet.

    Raises:
        ValueError: an argument is unknown or not valid.
    """
    _check_names("retinanet", kwargs, RetinaNet)
    pyramid = PyramidBackbone(
        backbone,
        neck,
        first_stage=2,
        out_channels=CHANNELS,
        extra_levels="convolutions",
        frozen_stages=frozen_stages,
        norm_eval=norm_eval,
        **(backbone_kwargs or {}),
    )
    anchors = Anchors(pyramid.strides, RETINA_SCALES, RATIOS)
    norm = None if head_norm_groups is None else partial(nn.GroupNorm, head_norm_groups)
    return LabelledRetinaNet(
        pyramid,
        num_classes,
        anchor_generator=anchors,
        head=RetinaHead(CHANNELS, anchors.num_anchors_per_location()[0], num_classes, norm_layer=norm),
        proposal_matcher=Matcher(fg_iou_thresh, bg_iou_thresh, 0.0),
        detections_per_img=detections_per_img,
        **kwargs,
    )


def _check_names(family: str, given: dict[str, Any], detector: type[nn.Module]) -> None:
    """Refuses unknown arguments, which torchvision's detectors ignore (they pass them to their transform).

    An argument of another family, such as an RPN's for RetinaNet, is unknown too: it would have no effect.
    """
    known = {
        name
        for owner in (detector, DetectionTransform)
        for name, one in inspect.signature(owner).parameters.items()
        if one.kind is not one.VAR_KEYWORD
    } | {"_skip_resize"}
    unknown = []
    for name in sorted(set(given) - known):
        near = difflib.get_close_matches(name, known, n=1)
        unknown.append(repr(name) + (f" ({near[0]} is one)" if near else ""))
    if unknown:
        raise ValueError(f"model_kwargs must be arguments of {family}, got {', '.join(unknown)}")


def _two_stage(
    backbone: str,
    neck: str,
    head: str,
    frozen_stages: int,
    norm_eval: bool,
    backbone_kwargs: dict[str, Any] | None,
) -> tuple[PyramidBackbone, ProposalHead]:
    """The pyramid and the RPN's head of Faster and Mask R-CNN."""
    check_layer("head", head)
    rpn_head = ProposalHead(CHANNELS, len(PROPOSAL_SCALES) * len(RATIOS))
    if head == "involution":
        rpn_head.conv[0][0] = involution_layer(CHANNELS, backbone)
    pyramid = PyramidBackbone(
        backbone,
        neck,
        out_channels=CHANNELS,
        extra_levels="pool",
        frozen_stages=frozen_stages,
        norm_eval=norm_eval,
        **(backbone_kwargs or {}),
    )
    return pyramid, rpn_head
