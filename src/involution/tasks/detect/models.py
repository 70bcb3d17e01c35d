"""Faster R-CNN, Mask R-CNN and RetinaNet: torchvision's, on RedNet, with involution in neck and head (section 4.2).

Sampling, NMS and coding of boxes are torchvision's; what the published detectors compute otherwise is in `anchors`,
`regions` and `masks`, and their numbers are the defaults here. Labels are 1 to num_classes, 0 is background. Where the
neck is of involution, every 3x3 convolution of the pyramid is a 7x7 involution; where the head is, that of the RPN and
those of the mask head.
"""

import difflib
import inspect
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.ops import sigmoid_focal_loss

from ...engine.data import IMAGENET_MEAN, IMAGENET_STD
from ...zoo.fpn import PyramidBackbone, check_layer, involution_layer
from .anchors import Anchors, Matcher
from .float32 import Linear, in_float32
from .regions import DetectionTransform, ProposalHead, ProposalNetwork, RegionAlign, RegionHeads

CHANNELS = 256  # of the pyramid
RATIOS = (0.5, 1.0, 2.0)  # of anchors: height over width
SCALES = (8.0,)  # of the RPN's anchors, as multiples of a level's stride
RETINA_SCALES = tuple(4 * 2 ** (octave / 3) for octave in range(3))
BOX_SIZE, MASK_SIZE = 7, 14  # of a region's features
PROPOSAL_QUALITY = 0.3  # IoU that an object's best anchor must have in the RPN
MASK_QUALITY = 0.5  # IoU that an object's best proposal must have in Mask R-CNN


class BoxHead(TwoMLPHead):
    """torchvision's two fully connected layers, with their activations as modules, which counting sees."""

    def __init__(self, in_channels: int, representation_size: int) -> None:
        super().__init__(in_channels, representation_size)
        self.act6, self.act7 = nn.ReLU(), nn.ReLU()
        for layer in (self.fc6, self.fc7):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[R, C, 7, 7] -> [R, representation_size]."""
        x = self.act6(self.fc6(x.flatten(start_dim=1)))
        result: Tensor = self.act7(self.fc7(x))
        return result


class BoxPredictor(FastRCNNPredictor):
    """Scores for classes and background, box deltas for the classes alone: torchvision's background slot is zero."""

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__(in_channels, num_classes + 1)
        self.cls_score = Linear(in_channels, num_classes + 1)
        self.bbox_pred = Linear(in_channels, 4 * num_classes)
        for layer, std in ((self.cls_score, 0.01), (self.bbox_pred, 0.001)):
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[R, C] -> scores [R, num_classes + 1], deltas [R, 4 * (num_classes + 1)]."""
        scores, deltas = super().forward(x)
        return scores, F.pad(deltas, (4, 0))


class MaskPredictor(MaskRCNNPredictor):
    """Masks for the classes alone: torchvision's background slot is zero."""

    def __init__(self, in_channels: int, dim_reduced: int, num_classes: int) -> None:
        super().__init__(in_channels, dim_reduced, num_classes)
        in_float32(self, "mask_fcn_logits")
        for layer in (self.conv5_mask, self.mask_fcn_logits):
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[R, C, 14, 14] -> logits [R, num_classes + 1, 28, 28]."""
        return F.pad(super().forward(x), (0, 0, 0, 0, 1, 0))


class RCNN(GeneralizedRCNN):
    """Faster R-CNN and, with a mask head, Mask R-CNN, of torchvision's parts.

    The arguments from `min_size` on are those of torchvision's FasterRCNN; their defaults are the published detectors'.

    Args:
        backbone: a pyramid whose last level is for the RPN alone.
        rpn_head: of 3 anchors a position.
        num_classes: without background.
        mask_head: of masks, or None.
    """

    def __init__(
        self,
        backbone: PyramidBackbone,
        rpn_head: nn.Module,
        num_classes: int,
        mask_head: nn.Module | None = None,
        *,
        min_size: int | Sequence[int] = 800,
        max_size: int = 1333,
        image_mean: Sequence[float] = IMAGENET_MEAN,
        image_std: Sequence[float] = IMAGENET_STD,
        rpn_pre_nms_top_n_train: int = 2000,
        rpn_pre_nms_top_n_test: int = 1000,
        rpn_post_nms_top_n_train: int = 1000,
        rpn_post_nms_top_n_test: int = 1000,
        rpn_nms_thresh: float = 0.7,
        rpn_fg_iou_thresh: float = 0.7,
        rpn_bg_iou_thresh: float = 0.3,
        rpn_batch_size_per_image: int = 256,
        rpn_positive_fraction: float = 0.5,
        rpn_score_thresh: float = 0.0,
        box_score_thresh: float = 0.05,
        box_nms_thresh: float = 0.5,
        box_detections_per_img: int = 100,
        box_fg_iou_thresh: float = 0.5,
        box_bg_iou_thresh: float = 0.5,
        box_batch_size_per_image: int = 512,
        box_positive_fraction: float = 0.25,
        bbox_reg_weights: tuple[float, float, float, float] = (10.0, 10.0, 5.0, 5.0),
        **transform: Any,
    ) -> None:
        proposals = ProposalNetwork(
            Anchors(backbone.strides, SCALES, RATIOS),
            rpn_head,
            rpn_fg_iou_thresh,
            rpn_bg_iou_thresh,
            rpn_batch_size_per_image,
            rpn_positive_fraction,
            {"training": rpn_pre_nms_top_n_train, "testing": rpn_pre_nms_top_n_test},
            {"training": rpn_post_nms_top_n_train, "testing": rpn_post_nms_top_n_test},
            rpn_nms_thresh,
            rpn_score_thresh,
        )
        proposals.proposal_matcher = Matcher(rpn_fg_iou_thresh, rpn_bg_iou_thresh, PROPOSAL_QUALITY)
        strides = backbone.strides[:-1]
        levels = [str(index) for index in range(len(strides))]
        regions = RegionHeads(
            RegionAlign(levels, strides, BOX_SIZE),
            BoxHead(backbone.out_channels * BOX_SIZE**2, 1024),
            BoxPredictor(1024, num_classes),
            box_fg_iou_thresh,
            box_bg_iou_thresh,
            box_batch_size_per_image,
            box_positive_fraction,
            bbox_reg_weights,
            box_score_thresh,
            box_nms_thresh,
            box_detections_per_img,
        )
        if mask_head is not None:
            regions.mask_roi_pool = RegionAlign(levels, strides, MASK_SIZE)
            regions.mask_head = mask_head
            regions.mask_predictor = MaskPredictor(CHANNELS, CHANNELS, num_classes)
        quality = None if mask_head is None else MASK_QUALITY
        regions.proposal_matcher = Matcher(box_fg_iou_thresh, box_bg_iou_thresh, quality)
        images = DetectionTransform(min_size, max_size, list(image_mean), list(image_std), **transform)
        super().__init__(backbone, proposals, regions, images)


class RetinaHead(RetinaNetHead):
    """torchvision's, with outputs in float32, and losses that the positive anchors of a whole step share.

    torchvision divides every image's losses by its own positives: an image with few of them counts as much as a full
    one.
    """

    def __init__(self, in_channels: int, num_anchors: int, num_classes: int, norm_layer: Any = None) -> None:
        super().__init__(in_channels, num_anchors, num_classes, norm_layer)
        in_float32(self.classification_head, "cls_logits")
        in_float32(self.regression_head, "bbox_reg")

    def compute_loss(
        self,
        targets: list[dict[str, Tensor]],
        head_outputs: dict[str, Tensor],
        anchors: list[Tensor],
        matched_idxs: list[Tensor],
    ) -> dict[str, Tensor]:
        """Focal loss of all anchors that are not between the thresholds, L1 loss of the positive ones' boxes.

        Both are divided by the positive anchors of the batch; of several processes' batches, by their mean.
        """
        coder = self.regression_head.box_coder
        classification, regression = [], []
        outputs = zip(head_outputs["cls_logits"], head_outputs["bbox_regression"], strict=True)
        for target, (logits, deltas), own, matched in zip(targets, outputs, anchors, matched_idxs, strict=True):
            positive, known = matched >= 0, matched != Matcher.BETWEEN_THRESHOLDS
            objects = matched[positive]
            wanted = torch.zeros_like(logits)
            wanted[positive, target["labels"][objects]] = 1
            classification.append(sigmoid_focal_loss(logits[known], wanted[known], reduction="sum"))
            coded = coder.encode_single(target["boxes"][objects], own[positive])
            regression.append(F.l1_loss(deltas[positive], coded, reduction="sum"))
        positives = mean_of_processes(torch.stack([(matched >= 0).sum() for matched in matched_idxs]).sum().float())
        losses = {"classification": classification, "bbox_regression": regression}
        return {name: torch.stack(parts).sum() / positives.clamp(min=1) for name, parts in losses.items()}


def mean_of_processes(value: Tensor) -> Tensor:
    """The mean of all processes' values; without several processes, the value itself."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(value)
        value = value / torch.distributed.get_world_size()
    return value


class LabelledRetinaNet(RetinaNet):
    """torchvision's RetinaNet counts classes from 0, the other detectors from 1: here all do."""

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None) -> Any:
        """As torchvision's: losses in training, detections otherwise."""
        if targets is not None:
            targets = [{**target, "labels": target["labels"] - 1} for target in targets]
        result = super().forward(images, targets)
        if self.training:
            return result
        return [{**found, "labels": found["labels"] + 1} for found in result]


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
        **kwargs: of torchvision's FasterRCNN, such as box_detections_per_img; see `RCNN`.

    Raises:
        ValueError: an argument does not fit.
    """
    _check_names(kwargs, RCNN)
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
    """Mask R-CNN with FPN; arguments as in `faster_rcnn`, and `head` is that of the mask head too."""
    _check_names(kwargs, RCNN)
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
        backbone: see `faster_rcnn`, as all that is not here.
        neck: likewise.
        num_classes: likewise.
        frozen_stages: likewise.
        norm_eval: likewise.
        backbone_kwargs: likewise.
        head_norm_groups: of group norms in the head; None has no norms there, as published. From scratch the head
            hardly learns without them.
        fg_iou_thresh: IoU from which on an anchor is positive; an object's best anchor is in any case.
        bg_iou_thresh: IoU below which it is negative.
        detections_per_img: at most so many.
        **kwargs: of torchvision's RetinaNet.

    Raises:
        ValueError: an argument does not fit.
    """
    _check_names(kwargs, RetinaNet)
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


def _check_names(given: dict[str, Any], detector: type[nn.Module]) -> None:
    """Refuses arguments that torchvision, which hands what it does not know to its transform, would not miss."""
    known = {
        name
        for taker in (detector, DetectionTransform)
        for name, one in inspect.signature(taker).parameters.items()
        if one.kind is not one.VAR_KEYWORD
    } | {"_skip_resize"}
    unknown = sorted(set(given) - known)
    if unknown:
        near = difflib.get_close_matches(unknown[0], known, n=1)
        hint = f"; {near[0]} is one" if near else ""
        raise ValueError(f"model_kwargs must be arguments of the detector, got {unknown[0]!r}{hint}")


def _two_stage(
    backbone: str,
    neck: str,
    head: str,
    frozen_stages: int,
    norm_eval: bool,
    backbone_kwargs: dict[str, Any] | None,
) -> tuple[PyramidBackbone, ProposalHead]:
    """The pyramid and the RPN's head of both R-CNNs."""
    check_layer("head", head)
    rpn_head = ProposalHead(CHANNELS, len(SCALES) * len(RATIOS))
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
