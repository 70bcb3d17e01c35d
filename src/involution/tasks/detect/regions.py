"""The two stages of Faster and Mask R-CNN: torchvision's, changed where the published detectors differ.

Boxes, scores and losses are float32 whatever the network's dtype: in bfloat16 the coordinate 1001 is 1000.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import MultiScaleRoIAlign, roi_align
from torchvision.ops.poolers import LevelMapper

from .float32 import in_float32
from .masks import mask_targets, paste_masks

Targets = list[dict[str, Tensor]]


class ProposalHead(RPNHead):
    """torchvision's RPNHead with float32 outputs."""

    def __init__(self, in_channels: int, num_anchors: int) -> None:
        super().__init__(in_channels, num_anchors)
        in_float32(self, "cls_logits", "bbox_pred")


class ProposalNetwork(RegionProposalNetwork):
    """torchvision's RegionProposalNetwork, with an L1 loss of boxes instead of smooth L1."""

    def compute_loss(
        self, objectness: Tensor, pred_bbox_deltas: Tensor, labels: list[Tensor], regression_targets: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Losses of objectness and boxes, each a mean over the anchors sampled from all images."""
        positive, negative = (torch.cat(chosen) > 0 for chosen in self.fg_bg_sampler(labels))
        sampled = positive | negative
        wanted = torch.cat(regression_targets)[positive]
        boxes = F.l1_loss(pred_bbox_deltas[positive], wanted, reduction="sum") / sampled.sum().clamp(min=1)
        return F.binary_cross_entropy_with_logits(objectness.flatten()[sampled], torch.cat(labels)[sampled]), boxes


class RegionAlign(MultiScaleRoIAlign):
    """RoIAlign on the levels of a pyramid: aligned, with adaptive sampling (one sample per pixel), in float32.

    torchvision infers the strides from the first batch and keeps them; here they are given. Its regions are shifted by
    half a pixel, and a cell has 2 x 2 samples whatever its size.

    Args:
        levels: names of the pyramid's levels, from the finest.
        strides: of the levels, in pixels.
        output_size: height and width of a region's features.
    """

    def __init__(self, levels: Sequence[str], strides: Sequence[int], output_size: int) -> None:
        super().__init__(list(levels), output_size, sampling_ratio=0)
        self.scales = [1 / stride for stride in strides]
        self.map_levels = LevelMapper(int(math.log2(strides[0])), int(math.log2(strides[-1])))

    def forward(self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]) -> Tensor:
        """Levels [N, C, h, w] and each image's boxes [n, 4] -> features of all boxes [R, C, size, size], same dtype."""
        levels = [x[name] for name in self.featmap_names]
        images = torch.cat([torch.full_like(of_image[:, :1], index) for index, of_image in enumerate(boxes)])
        regions = torch.cat([images, torch.cat(boxes)], dim=1).float()
        chosen = self.map_levels(boxes)
        shape = (regions.shape[0], levels[0].shape[1], *self.output_size)
        result = torch.zeros(shape, dtype=torch.float32, device=regions.device)
        for index, (level, scale) in enumerate(zip(levels, self.scales, strict=True)):
            here = torch.where(chosen == index)[0]
            result[here] = roi_align(level.float(), regions[here], self.output_size, scale, 0, aligned=True)
        return result.to(levels[0].dtype)


class RegionHeads(RoIHeads):
    """torchvision's RoIHeads, with L1 box loss, binary mask targets, and matching without the added true boxes."""

    def assign_targets_to_proposals(
        self, proposals: list[Tensor], gt_boxes: list[Tensor], gt_labels: list[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The index of the true box of each proposal of each image, and its label; 0 is background.

        The last proposals are the true boxes (`add_gt_proposals`). They match themselves, and are left out of the
        matching: otherwise each would be its own best proposal.
        """
        found = [one[: len(one) - len(true)] for one, true in zip(proposals, gt_boxes, strict=True)]
        matched, labels = super().assign_targets_to_proposals(found, gt_boxes, gt_labels)
        themselves = [torch.arange(len(true), device=true.device) for true in gt_boxes]
        return (
            [torch.cat(pair) for pair in zip(matched, themselves, strict=True)],
            [torch.cat(pair) for pair in zip(labels, gt_labels, strict=True)],
        )

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: Targets | None = None,
    ) -> tuple[Targets, dict[str, Tensor]]:
        """In evaluation the detections of every image and no losses; in training no detections, and the losses."""
        if self.training:
            return [], self._losses(features, proposals, image_shapes, targets)
        scores, deltas = self._of_boxes(features, proposals, image_shapes)
        found = self.postprocess_detections(scores, deltas, proposals, image_shapes)
        result = [dict(zip(("boxes", "scores", "labels"), one, strict=True)) for one in zip(*found, strict=True)]
        if self.has_mask():
            logits = self._of_masks(features, found[0], image_shapes, torch.cat(found[2]))
            counts = [len(boxes) for boxes in found[0]]
            for one, masks in zip(result, logits.sigmoid()[:, None].split(counts), strict=True):
                one["masks"] = masks
        return result, {}

    def _losses(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: Targets | None,
    ) -> dict[str, Tensor]:
        proposals, matched, by_image, coded = self.select_training_samples(proposals, targets)
        scores, deltas = self._of_boxes(features, proposals, image_shapes)
        labels = torch.cat(by_image)
        positive = torch.where(labels > 0)[0]
        of_label = deltas.unflatten(1, (-1, 4))[positive, labels[positive]]
        losses = {
            "loss_classifier": F.cross_entropy(scores, labels),
            "loss_box_reg": F.l1_loss(of_label, torch.cat(coded)[positive], reduction="sum") / len(labels),
        }
        if self.has_mask() and targets is not None:
            objects = [of_image > 0 for of_image in by_image]
            boxes = [one[chosen] for one, chosen in zip(proposals, objects, strict=True)]
            logits = self._of_masks(features, boxes, image_shapes, labels[positive])
            wanted = [
                mask_targets(target["masks"], one, match[chosen], logits.shape[-1])
                for target, one, match, chosen in zip(targets, boxes, matched, objects, strict=True)
            ]
            loss = F.binary_cross_entropy_with_logits(logits, torch.cat(wanted), reduction="sum")
            losses["loss_mask"] = loss / max(1, logits.numel())
        return losses

    def _of_boxes(
        self, features: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]
    ) -> tuple[Tensor, Tensor]:
        """Scores [R, classes + 1] and box deltas [R, 4 * (classes + 1)]."""
        found: tuple[Tensor, Tensor] = self.box_predictor(
            self.box_head(self.box_roi_pool(features, boxes, image_shapes))
        )
        return found

    def _of_masks(
        self, features: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]], labels: Tensor
    ) -> Tensor:
        """Mask logits of each box's label, [R, 28, 28]."""
        logits = self.mask_predictor(self.mask_head(self.mask_roi_pool(features, boxes, image_shapes)))
        result: Tensor = logits[torch.arange(len(labels), device=labels.device), labels]
        return result


class DetectionTransform(GeneralizedRCNNTransform):
    """torchvision's GeneralizedRCNNTransform, with masks pasted at sub-pixel boxes as bool."""

    def postprocess(
        self, result: Targets, image_shapes: list[tuple[int, int]], original_image_sizes: list[tuple[int, int]]
    ) -> Targets:
        """Detections in the pixels of the original images: boxes [n, 4], masks [n, 1, H, W] bool."""
        masks = [found.pop("masks", None) for found in result]
        result = super().postprocess(result, image_shapes, original_image_sizes)
        for found, of_image, size in zip(result, masks, original_image_sizes, strict=not self.training):
            if of_image is not None:
                found["masks"] = paste_masks(of_image, found["boxes"], size)
        return result
