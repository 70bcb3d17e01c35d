"""RetinaNet: torchvision's, with the losses of the published detector."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.ops import sigmoid_focal_loss

from .anchors import Matcher
from .float32 import in_float32

SCALES = tuple(4 * 2 ** (octave / 3) for octave in range(3))  # of anchors, as multiples of a level's stride


class RetinaHead(RetinaNetHead):
    """torchvision's head with float32 outputs, and losses normalised by the positive anchors of the whole batch.

    torchvision normalises each image's losses by that image's positive anchors, so that an image with few of them
    weighs as much as one with many.
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
        """Focal loss of all anchors that are not between the thresholds, and L1 loss of the positive anchors' boxes.

        Both are divided by the number of positive anchors in the batch, averaged over all processes.
        """
        coder = self.regression_head.box_coder
        classification, regression = [], []
        outputs = zip(head_outputs["cls_logits"], head_outputs["bbox_regression"], strict=True)
        for target, (logits, deltas), of_image, matched in zip(targets, outputs, anchors, matched_idxs, strict=True):
            positive, known = matched >= 0, matched != Matcher.BETWEEN_THRESHOLDS
            objects = matched[positive]
            wanted = torch.zeros_like(logits)
            wanted[positive, target["labels"][objects]] = 1
            classification.append(sigmoid_focal_loss(logits[known], wanted[known], reduction="sum"))
            coded = coder.encode_single(target["boxes"][objects], of_image[positive])
            regression.append(F.l1_loss(deltas[positive], coded, reduction="sum"))
        positives = mean_of_processes(torch.stack([(matched >= 0).sum() for matched in matched_idxs]).sum().float())
        losses = {"classification": classification, "bbox_regression": regression}
        return {name: torch.stack(parts).sum() / positives.clamp(min=1) for name, parts in losses.items()}


def mean_of_processes(value: Tensor) -> Tensor:
    """The mean of a value over all processes."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(value)
        value = value / torch.distributed.get_world_size()
    return value


class LabelledRetinaNet(RetinaNet):
    """torchvision's RetinaNet, but labels count from 1, as in the other detectors."""

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None) -> Any:
        """As torchvision's: losses in training, detections otherwise."""
        if targets is not None:
            targets = [{**target, "labels": target["labels"] - 1} for target in targets]
        result = super().forward(images, targets)
        if self.training:
            return result
        return [{**found, "labels": found["labels"] + 1} for found in result]
