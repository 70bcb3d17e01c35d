"""Faster R-CNN and Mask R-CNN: torchvision's, with the heads and the numbers of the published detectors."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.mask_rcnn import MaskRCNNPredictor

from ...engine.data import IMAGENET_MEAN, IMAGENET_STD
from ...zoo.fpn import PyramidBackbone
from .anchors import RATIOS, Anchors, Matcher
from .float32 import Linear, in_float32
from .regions import DetectionTransform, ProposalNetwork, RegionAlign, RegionHeads

SCALES = (8.0,)  # of the RPN's anchors, as multiples of a level's stride
BOX_SIZE, MASK_SIZE = 7, 14  # height and width of a region's features
PROPOSAL_QUALITY = 0.3  # IoU that an object's best anchor must have in the RPN
MASK_QUALITY = 0.5  # IoU that an object's best proposal must have in Mask R-CNN


class BoxHead(TwoMLPHead):
    """torchvision's two fully connected layers; the activations are modules, so that `involution cost` counts them."""

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
    """Scores for classes and background, and box deltas for the classes alone, padded with zeros for the background."""

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
    """Mask logits for the classes alone, padded with zeros for the background."""

    def __init__(self, in_channels: int, dim_reduced: int, num_classes: int) -> None:
        super().__init__(in_channels, dim_reduced, num_classes)
        in_float32(self, "mask_fcn_logits")
        for layer in (self.conv5_mask, self.mask_fcn_logits):
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[R, C, 14, 14] -> logits [R, num_classes + 1, 28, 28]."""
        return F.pad(super().forward(x), (0, 0, 0, 0, 1, 0))


class RCNN(GeneralizedRCNN):
    """Faster R-CNN and, with a mask head, Mask R-CNN, built from torchvision's parts.

    The arguments from `min_size` on are those of torchvision's FasterRCNN; their defaults are the published detectors'.

    Args:
        backbone: a pyramid whose last level is for the RPN alone.
        rpn_head: for 3 anchors per position.
        num_classes: without background.
        mask_head: [R, C, 14, 14] -> the same shape, or None for Faster R-CNN.
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
            regions.mask_predictor = MaskPredictor(backbone.out_channels, backbone.out_channels, num_classes)
        quality = None if mask_head is None else MASK_QUALITY
        regions.proposal_matcher = Matcher(box_fg_iou_thresh, box_bg_iou_thresh, quality)
        images = DetectionTransform(min_size, max_size, list(image_mean), list(image_std), **transform)
        super().__init__(backbone, proposals, regions, images)
