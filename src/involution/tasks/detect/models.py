"""Faster R-CNN, Mask R-CNN and RetinaNet: torchvision's, on RedNet, with involution in neck and head (section 4.2).

Anchors, matching, sampling, RoIAlign, NMS and losses are torchvision's. Labels are 1 to num_classes, 0 is background.
Where the neck is of involution, every 3x3 convolution of the pyramid is a 7x7 involution; where the head is, that of
the RPN and those of the mask head.
"""

from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection import FasterRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.models.detection.rpn import RPNHead

from ...zoo.fpn import PyramidBackbone, check_layer, involution_layer

CHANNELS = 256  # of the pyramid
RATIOS = (0.5, 1.0, 2.0)  # of anchors: height over width


class BoxHead(TwoMLPHead):
    """torchvision's two fully connected layers, with their activations as modules, which counting sees."""

    def __init__(self, in_channels: int, representation_size: int) -> None:
        super().__init__(in_channels, representation_size)
        self.act6, self.act7 = nn.ReLU(), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """[R, C, 7, 7] -> [R, representation_size]."""
        x = self.act6(self.fc6(x.flatten(start_dim=1)))
        result: Tensor = self.act7(self.fc7(x))
        return result


class BoxPredictor(FastRCNNPredictor):
    """Scores for classes and background, box deltas for the classes alone: torchvision's background slot is zero."""

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__(in_channels, num_classes + 1)
        self.bbox_pred = nn.Linear(in_channels, 4 * num_classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[R, C] -> scores [R, num_classes + 1], deltas [R, 4 * (num_classes + 1)]."""
        scores, deltas = super().forward(x)
        return scores, F.pad(deltas, (4, 0))


class MaskPredictor(MaskRCNNPredictor):
    """Masks for the classes alone: torchvision's background slot is zero."""

    def forward(self, x: Tensor) -> Tensor:
        """[R, C, 14, 14] -> logits [R, num_classes + 1, 28, 28]."""
        return F.pad(super().forward(x), (0, 0, 0, 0, 1, 0))


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
) -> FasterRCNN:
    """Faster R-CNN with FPN.

    Args:
        backbone: a RedNet or ResNet of timm's registry.
        neck: "convolution" or "involution", of the pyramid.
        head: "convolution" or "involution", of the RPN.
        num_classes: without background.
        frozen_stages: see `PyramidBackbone`; the paper has 1, with pretrained weights.
        norm_eval: see `PyramidBackbone`; the paper has True, with pretrained weights.
        backbone_kwargs: further arguments of timm.create_model, such as stem_kernel_size.
        **kwargs: of torchvision's FasterRCNN.

    Raises:
        ValueError: an argument does not fit.
    """
    parts = _two_stage(backbone, neck, head, num_classes, frozen_stages, norm_eval, backbone_kwargs)
    return FasterRCNN(**parts, **kwargs)


def mask_rcnn(
    backbone: str = "rednet50",
    neck: str = "convolution",
    head: str = "convolution",
    num_classes: int = 80,
    frozen_stages: int = 0,
    norm_eval: bool = False,
    backbone_kwargs: dict[str, Any] | None = None,
    **kwargs: Any,
) -> MaskRCNN:
    """Mask R-CNN with FPN; arguments as in `faster_rcnn`, and `head` is that of the mask head too."""
    mask_head = MaskRCNNHeads(CHANNELS, (CHANNELS,) * 4, 1)
    if head == "involution":
        for block in mask_head:
            block[0] = involution_layer(CHANNELS)
    return MaskRCNN(
        **_two_stage(backbone, neck, head, num_classes, frozen_stages, norm_eval, backbone_kwargs),
        mask_head=mask_head,
        mask_predictor=MaskPredictor(CHANNELS, CHANNELS, num_classes),
        **kwargs,
    )


def retinanet(
    backbone: str = "rednet50",
    neck: str = "convolution",
    num_classes: int = 80,
    frozen_stages: int = 0,
    norm_eval: bool = False,
    backbone_kwargs: dict[str, Any] | None = None,
    head_norm_groups: int | None = None,
    **kwargs: Any,
) -> RetinaNet:
    """RetinaNet on levels from stride 8 to 128; arguments as in `faster_rcnn`. Its head is of convolutions.

    Args:
        head_norm_groups: of group norms in the head; None has no norms there, as published. From scratch the head
            hardly learns without them.
    """
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
    anchors = _retina_anchors()
    norm = None if head_norm_groups is None else partial(nn.GroupNorm, head_norm_groups)
    head = RetinaNetHead(CHANNELS, anchors.num_anchors_per_location()[0], num_classes, norm_layer=norm)
    return LabelledRetinaNet(pyramid, num_classes, anchor_generator=anchors, head=head, **kwargs)


def _retina_anchors() -> AnchorGenerator:
    sizes = tuple(tuple(round(size * 2 ** (octave / 3)) for octave in range(3)) for size in (32, 64, 128, 256, 512))
    return AnchorGenerator(sizes, (RATIOS,) * len(sizes))


def _two_stage(
    backbone: str,
    neck: str,
    head: str,
    num_classes: int,
    frozen_stages: int,
    norm_eval: bool,
    backbone_kwargs: dict[str, Any] | None,
) -> dict[str, Any]:
    """What both R-CNNs are made of, as torchvision's arguments."""
    check_layer("head", head)
    rpn_head = RPNHead(CHANNELS, len(RATIOS))
    if head == "involution":
        rpn_head.conv[0][0] = involution_layer(CHANNELS)
    return {
        "backbone": PyramidBackbone(
            backbone,
            neck,
            out_channels=CHANNELS,
            extra_levels="pool",
            frozen_stages=frozen_stages,
            norm_eval=norm_eval,
            **(backbone_kwargs or {}),
        ),
        "rpn_head": rpn_head,
        "box_head": BoxHead(CHANNELS * 7 * 7, 1024),
        "box_predictor": BoxPredictor(1024, num_classes),
    }
