"""Detectors as programs: the steps of torchvision's for one image of a fixed size, without branches on values.

torchvision's own detectors cannot be traced: `batched_nms` chooses between two implementations by the number of boxes.
Here non-maximum suppression always runs on boxes that are shifted apart by class or by level, which is what torchvision
exports with its older exporter. Boxes of the RPN that are too small or score too little are left out after the
suppression instead of before it: they score less than all others, and so suppress none of them.
"""

import torch
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import concat_box_prediction_layers
from torchvision.ops import clip_boxes_to_image, nms

from ..tasks.detect.rcnn import RCNN
from ..tasks.detect.retina import LabelledRetinaNet

OUTPUTS = ("boxes", "scores", "labels", "masks")
SMALLEST_PROPOSAL, SMALLEST_BOX = 1e-3, 1e-2  # sides in pixels, as in torchvision


def detections(network: RCNN | LabelledRetinaNet) -> nn.Module:
    """A detector as a module that can be traced; its outputs are `OUTPUTS`, masks only of a Mask R-CNN."""
    return RCNNDetections(network) if isinstance(network, RCNN) else RetinaDetections(network)


class RCNNDetections(nn.Module):
    """Faster R-CNN or Mask R-CNN: [1, 3, H, W] normalised -> boxes, scores, labels and, with a mask head, masks.

    Boxes [n, 4] are left, top, right, bottom in pixels of the input, scores [n] descend, labels [n] count from 1, masks
    [n, 28, 28] are probabilities inside each box.
    """

    def __init__(self, network: RCNN) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """One image's detections."""
        size = (images.shape[2], images.shape[3])
        heads = self.network.roi_heads
        features = self.network.backbone(images)
        proposals = self._proposals(images, features, size)
        logits, deltas = heads.box_predictor(heads.box_head(heads.box_roi_pool(features, [proposals], [size])))
        decoded = heads.box_coder.decode_single(deltas, proposals).unflatten(1, (-1, 4))[:, 1:].flatten(0, 1)
        boxes = clip_boxes_to_image(decoded, size)
        scores = _without_slivers(logits.softmax(-1)[:, 1:].reshape(-1), boxes, SMALLEST_BOX)
        chosen = torch.where(scores > heads.score_thresh)[0]
        boxes, scores, labels = boxes[chosen], scores[chosen], 1 + chosen % (logits.shape[1] - 1)
        kept = _suppressed(boxes, scores, labels, heads.nms_thresh, size)[: heads.detections_per_img]
        boxes, scores, labels = boxes[kept], scores[kept], labels[kept]
        if not heads.has_mask():
            return boxes, scores, labels
        of_classes = heads.mask_predictor(heads.mask_head(heads.mask_roi_pool(features, [boxes], [size])))
        wanted = labels[:, None, None, None].expand(-1, 1, *of_classes.shape[2:])
        return boxes, scores, labels, of_classes.gather(1, wanted)[:, 0].sigmoid()

    def _proposals(self, images: Tensor, features: dict[str, Tensor], size: tuple[int, int]) -> Tensor:
        """The RPN's boxes [R, 4], at most rpn_post_nms_top_n_test."""
        rpn = self.network.rpn
        levels = list(features.values())
        objectness, deltas = rpn.head(levels)
        counts = [level.shape[1] * level.shape[2] * level.shape[3] for level in objectness]
        anchors = rpn.anchor_generator(ImageList(images, [size]), levels)
        flat, flat_deltas = concat_box_prediction_layers(objectness, deltas)
        boxes = clip_boxes_to_image(rpn.box_coder.decode(flat_deltas, anchors)[:, 0], size)
        best, numbers, first = [], [], 0
        for number, (count, scores) in enumerate(zip(counts, flat[:, 0].split(counts), strict=True)):
            best.append(first + scores.topk(min(rpn.pre_nms_top_n(), count))[1])
            numbers.append(torch.full_like(best[-1], number))
            first += count
        chosen = torch.cat(best)
        boxes = boxes[chosen]
        scores = _without_slivers(flat[chosen, 0].sigmoid(), boxes, SMALLEST_PROPOSAL)
        kept = _suppressed(boxes, scores, torch.cat(numbers), rpn.nms_thresh, size)
        counting = scores[kept] >= max(rpn.score_thresh, 0.0)
        return boxes[kept[counting][: rpn.post_nms_top_n()]]


class RetinaDetections(nn.Module):
    """RetinaNet: [1, 3, H, W] normalised -> boxes, scores and labels, as `RCNNDetections`."""

    def __init__(self, network: LabelledRetinaNet) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """One image's detections."""
        network, size = self.network, (images.shape[2], images.shape[3])
        levels = list(network.backbone(images).values())
        outputs = network.head(levels)
        anchors = network.anchor_generator(ImageList(images, [size]), levels)[0]
        logits, deltas = outputs["cls_logits"][0], outputs["bbox_regression"][0]
        classes = logits.shape[1]
        per_position = network.anchor_generator.num_anchors_per_location()
        counts = [count * level.shape[2] * level.shape[3] for count, level in zip(per_position, levels, strict=True)]
        best, first = [], 0
        for count, of_level in zip(counts, logits.split(counts), strict=True):
            top = of_level.flatten().topk(min(network.topk_candidates, count * classes))[1]
            best.append(first * classes + top)
            first += count
        chosen = torch.cat(best)
        scores = logits.flatten()[chosen].sigmoid()
        counting = torch.where(scores > network.score_thresh)[0]
        chosen, scores = chosen[counting], scores[counting]
        of_anchor = chosen // classes
        boxes = network.box_coder.decode_single(deltas[of_anchor], anchors[of_anchor])
        boxes, labels = clip_boxes_to_image(boxes, size), chosen % classes
        kept = _suppressed(boxes, scores, labels, network.nms_thresh, size)[: network.detections_per_img]
        return boxes[kept], scores[kept], labels[kept] + 1


def _without_slivers(scores: Tensor, boxes: Tensor, smallest: float) -> Tensor:
    """Scores [n], -1 where a side of the box is shorter than `smallest` pixels."""
    sides = boxes[:, 2:] - boxes[:, :2]
    return torch.where((sides >= smallest).all(1), scores, -1.0)


def _suppressed(boxes: Tensor, scores: Tensor, kinds: Tensor, threshold: float, size: tuple[int, int]) -> Tensor:
    """The indices of the boxes that non-maximum suppression keeps within each kind, by descending score.

    Kinds lie side by side in one plane: every box is inside the image, so shifts by more than its longer side suffice.
    """
    return nms(boxes + (kinds * (max(size) + 1))[:, None].to(boxes), scores, threshold)
