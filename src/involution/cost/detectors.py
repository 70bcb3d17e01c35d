"""The parts of a detector that the paper counts, as networks that run on the meta device."""

from torch import Tensor, nn
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN

BOX_REGIONS, MASK_REGIONS = 1000, 100


class CountedRCNN(nn.Module):
    """Backbone, pyramid and RPN on the image, the heads on a fixed number of regions.

    Args:
        detector: Faster or Mask R-CNN; its RPN's activation is removed, which the paper does not count.
    """

    def __init__(self, detector: GeneralizedRCNN) -> None:
        super().__init__()
        self.detector = detector
        detector.rpn.head.conv[0][1] = nn.Identity()

    def forward(self, image: Tensor) -> None:
        """[1, 3, H, W]."""
        levels = self.detector.backbone(image)
        self.detector.rpn.head(list(levels.values()))
        heads, channels = self.detector.roi_heads, self.detector.backbone.out_channels
        heads.box_predictor(heads.box_head(image.new_empty(BOX_REGIONS, channels, 7, 7)))
        if heads.has_mask():
            heads.mask_predictor(heads.mask_head(image.new_empty(MASK_REGIONS, channels, 14, 14)))


class CountedRetinaNet(nn.Module):
    """Backbone, pyramid and towers on the image."""

    def __init__(self, detector: RetinaNet) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, image: Tensor) -> None:
        """[1, 3, H, W]."""
        self.detector.head(list(self.detector.backbone(image).values()))
