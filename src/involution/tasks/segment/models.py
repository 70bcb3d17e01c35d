"""Semantic FPN and UPerNet on RedNet and ResNet, as in the paper's segmentation experiments (section 4.3).

Like torchvision's segmentation models, both return a dictionary: "out", logits of the image's size, and in training,
with an auxiliary head, "aux".
"""

from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.segmentation.fcn import FCNHead
from torchvision.ops import Conv2dNormActivation

from ...zoo.fpn import PyramidBackbone, check_layer

Logits = dict[str, Tensor]


def _resized(x: Tensor, like: Tensor) -> Tensor:
    """Resizes bilinearly to the height and width of another tensor."""
    size = like.shape[-2:]
    return x if x.shape[-2:] == size else F.interpolate(x, size=size, mode="bilinear", align_corners=False)


class Classify(nn.Sequential):
    """Dropout of whole channels, and a 1x1 convolution: [N, in_channels, H, W] -> [N, num_classes, H, W]."""

    def __init__(self, in_channels: int, num_classes: int, dropout: float) -> None:
        super().__init__(nn.Dropout2d(dropout), nn.Conv2d(in_channels, num_classes, 1))
        init_classifier(self[1])


def init_classifier(layer: Any) -> None:
    """Initialises a 1x1 convolution to classes."""
    nn.init.normal_(layer.weight, std=0.01)
    nn.init.zeros_(layer.bias)


def init_blocks(decoder: nn.Module) -> None:
    """Initialises a decoder's convolutions before norms with He's normal weights (fan_out)."""
    for module in decoder.modules():
        if isinstance(module, Conv2dNormActivation):
            nn.init.kaiming_normal_(module[0].weight, mode="fan_out", nonlinearity="relu")


class SemanticFPN(nn.Module):
    """Panoptic FPN's branch for semantic segmentation (Kirillov et al., CVPR 2019).

    Each pyramid level passes 3x3 convolutions, each followed by upsampling, until its stride is 4; the four are added.

    Args:
        backbone: a RedNet or ResNet of timm's registry.
        num_classes: of the logits.
        neck: "convolution" or "involution", of the pyramid.
        channels: of the head.
        dropout: probability before the last convolution.
        backbone_kwargs: further arguments of timm.create_model, such as stem_kernel_size.

    Shapes: [N, 3, H, W] -> {"out": [N, num_classes, H, W]}.

    Raises:
        ValueError: neck is neither.
    """

    def __init__(
        self,
        backbone: str = "rednet50",
        num_classes: int = 19,
        neck: str = "convolution",
        channels: int = 128,
        dropout: float = 0.1,
        backbone_kwargs: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        check_layer("neck", neck)
        self.pyramid = PyramidBackbone(backbone, neck, **(backbone_kwargs or {}))
        width = self.pyramid.out_channels
        self.branches = nn.ModuleList(_branch(level, width, channels) for level in range(4))
        init_blocks(self.branches)
        self.classify = Classify(channels, num_classes, dropout)

    @property
    def body(self) -> nn.Module:
        """timm's network."""
        body: nn.Module = self.pyramid.body
        return body

    def forward(self, images: Tensor) -> Logits:
        """[N, 3, H, W] -> {"out": [N, num_classes, H, W]}."""
        levels = self.pyramid(images).values()
        first, *others = (branch(level) for branch, level in zip(self.branches, levels, strict=True))
        for other in others:
            first = first + _resized(other, first)  # sizes differ only if the image's is no multiple of 32
        return {"out": _resized(self.classify(first), images)}


def _branch(level: int, in_channels: int, channels: int) -> nn.Sequential:
    """The branch of a level, from stride 4 * 2**level to 4."""
    steps: list[nn.Module] = []
    for _ in range(max(1, level)):
        steps.append(Conv2dNormActivation(in_channels, channels, 3))
        if level:
            steps.append(nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False))
        in_channels = channels
    return nn.Sequential(*steps)


class PyramidPooling(nn.Module):
    """PSPNet's pyramid pooling: averages over grids of cells, concatenated with the features, then a 3x3 convolution.

    Args:
        in_channels: of the features.
        channels: of each average and of the result.

    Shapes: [N, in_channels, H, W] -> [N, channels, H, W].
    """

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        grids = (1, 2, 3, 6)  # cells along each axis
        self.pools = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(grid), Conv2dNormActivation(in_channels, channels, 1)) for grid in grids
        )
        self.join = Conv2dNormActivation(in_channels + len(grids) * channels, channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        """[N, in_channels, H, W] -> [N, channels, H, W]."""
        size = x.shape[-2:]  # never compared with a grid's: an exported network would keep the comparison's outcome
        averages = [F.interpolate(pool(x), size, mode="bilinear", align_corners=False) for pool in self.pools]
        result: Tensor = self.join(torch.cat([x, *averages], dim=1))
        return result


class Auxiliary(FCNHead):
    """torchvision's FCN head, with the published one's channel dropout and initialisation."""

    def __init__(self, in_channels: int, num_classes: int, dropout: float) -> None:
        super().__init__(in_channels, num_classes)
        self[3] = nn.Dropout2d(dropout)
        nn.init.kaiming_normal_(self[0].weight, mode="fan_out", nonlinearity="relu")
        init_classifier(self[4])


class UPerNet(nn.Module):
    """UPerNet (Xiao et al., ECCV 2018), with an auxiliary FCN head on the third stage in training.

    Args:
        backbone: a RedNet or ResNet of timm's registry.
        num_classes: of the logits.
        channels: of the decoder.
        auxiliary: add the auxiliary head.
        dropout: probability before the last convolution.
        backbone_kwargs: further arguments of timm.create_model, such as stem_kernel_size.

    Shapes: [N, 3, H, W] -> {"out": [N, num_classes, H, W]}, in training also "aux" of the same shape. A training batch
    needs two images: pooling leaves one pixel per image, and batch norm needs more than one value.
    """

    def __init__(
        self,
        backbone: str = "rednet50",
        num_classes: int = 19,
        channels: int = 512,
        auxiliary: bool = True,
        dropout: float = 0.1,
        backbone_kwargs: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.body = timm.create_model(backbone, features_only=True, out_indices=(1, 2, 3, 4), **(backbone_kwargs or {}))
        *finer, last = self.body.feature_info.channels()
        self.pooling = PyramidPooling(last, channels)
        self.laterals = nn.ModuleList(Conv2dNormActivation(width, channels, 1) for width in finer)
        self.smooth = nn.ModuleList(Conv2dNormActivation(channels, channels, 3) for _ in finer)
        self.join = Conv2dNormActivation((len(finer) + 1) * channels, channels, 3)
        self.classify = Classify(channels, num_classes, dropout)
        for part in (self.pooling, self.laterals, self.smooth, self.join):
            init_blocks(part)
        self.auxiliary = Auxiliary(finer[-1], num_classes, dropout) if auxiliary else None

    def forward(self, images: Tensor) -> Logits:
        """[N, 3, H, W] -> {"out": [N, num_classes, H, W]}, in training with "aux"."""
        *finer, last = self.body(images)
        levels = [lateral(level) for lateral, level in zip(self.laterals, finer, strict=True)]
        levels.append(self.pooling(last))
        for index in reversed(range(len(finer))):
            levels[index] = levels[index] + _resized(levels[index + 1], levels[index])
        smoothed = [smooth(level) for smooth, level in zip(self.smooth, levels[:-1], strict=True)]
        every = [smoothed[0], *(_resized(level, smoothed[0]) for level in (*smoothed[1:], levels[-1]))]
        result = {"out": _resized(self.classify(self.join(torch.cat(every, dim=1))), images)}
        if self.training and self.auxiliary is not None:
            result["aux"] = _resized(self.auxiliary(finer[-1]), images)
        return result
