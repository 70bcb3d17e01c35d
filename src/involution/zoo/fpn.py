"""Feature pyramids whose 3x3 convolutions can be involutions (paper, section 4.2): torchvision's, a part swapped."""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import timm
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock, LastLevelMaxPool, LastLevelP6P7

from ..nn import Involution2d

LAYERS = ("convolution", "involution")


def check_layer(name: str, value: str) -> None:
    """Refuses what is neither convolution nor involution."""
    if value not in LAYERS:
        raise ValueError(f"{name} must be convolution or involution, got {value!r}")


class GeneratorBatchNorm2d(nn.BatchNorm2d):
    """Batch norm that takes its running statistics in training, too, where a batch has one value per channel.

    One value has no variance, and torch's batch norm raises ValueError. A pyramid's coarsest level is one pixel where
    images are small, and one image at a time is a batch of one value. The running statistics are not updated then.
    Everything else, the state dict included, is torch's; so is the error where no running statistics are tracked.
    """

    def forward(self, input: Tensor) -> Tensor:
        """[N, C, H, W] -> the same."""
        if self.training and self.running_mean is not None and (*input.shape[:1], *input.shape[2:]) == (1, 1, 1):
            return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        return super().forward(input)


def involution_layer(channels: int, backbone: str) -> Involution2d:
    """The 7x7 involution that takes a 3x3 convolution's place in necks and heads; it begins as the identity.

    On the paper's networks, rednet26 to rednet152, it has their kernel generator, with a batch norm, as published: a
    `GeneratorBatchNorm2d`, for levels of one pixel. On all others it has the default generator.

    Args:
        channels: of input and output.
        backbone: the name of the network that neck or head are on.
    """
    papers = backbone.startswith("rednet") and not backbone.startswith("rednetv2_")
    return Involution2d(channels, norm_layer=GeneratorBatchNorm2d if papers else None)


class ExtraConvolutions(LastLevelP6P7):
    """RetinaNet's two coarser levels, by convolutions of stride 2 from the last stage, with nothing between them.

    torchvision puts a ReLU before the second one; the published networks have none.
    """

    def forward(self, p: list[Tensor], c: list[Tensor], names: list[str]) -> tuple[list[Tensor], list[str]]:
        """Levels and stages, from the finest -> the levels with two more, and their names."""
        sixth = self.p6(c[-1])
        return [*p, sixth, self.p7(sixth)], [*names, "p6", "p7"]


def feature_pyramid(
    in_channels: Sequence[int],
    out_channels: int = 256,
    layer: str = "convolution",
    extra_blocks: ExtraFPNBlock | None = None,
    backbone: str = "",
) -> FeaturePyramidNetwork:
    """torchvision's FPN: 1x1 laterals, nearest upsampling, and a 3x3 convolution or a 7x7 involution on every level.

    Convolutions begin with Glorot's uniform weights, as published (torchvision takes He's).

    Args:
        in_channels: of the levels, from the finest.
        out_channels: of every level of the result; involution wants a multiple of 16.
        layer: "convolution" or "involution".
        extra_blocks: makes coarser levels, as in torchvision.
        backbone: the name of the network below, which decides the involutions' generator: see `involution_layer`.

    Raises:
        ValueError: layer is neither.
    """
    check_layer("layer", layer)
    pyramid = FeaturePyramidNetwork(list(in_channels), out_channels, extra_blocks)
    for module in pyramid.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.xavier_uniform_(module.weight)
    if layer == "involution":
        pyramid.layer_blocks = nn.ModuleList(involution_layer(out_channels, backbone) for _ in in_channels)
    return pyramid


class PyramidBackbone(nn.Module):
    """A network of timm's and a feature pyramid on its stages, as torchvision's detectors want it.

    Args:
        name: of a network of timm's registry whose feature levels are a stem and four stages: RedNet, ResNet.
        layer: of the pyramid, see `feature_pyramid`.
        first_stage: the finest stage that the pyramid takes: 1 (stride 4) or 2 (stride 8).
        out_channels: of every level.
        extra_levels: what comes after the stages' levels: "pool" is one more by pooling (R-CNNs), "convolutions" two by
            convolutions of stride 2 from the last stage (RetinaNet); None is nothing.
        frozen_stages: so many stages, and the stem, are not trained and stay in evaluation mode; 0 trains everything,
            stem included.
        norm_eval: the network's batch norms always use, and never update, their running statistics.
        **kwargs: further arguments of timm.create_model.

    Shapes: [N, 3, H, W] -> an OrderedDict of levels [N, out_channels, h, w], from the finest; `strides` are theirs, in
    pixels of the image.

    Raises:
        ValueError: an argument does not fit.
    """

    def __init__(
        self,
        name: str,
        layer: str = "convolution",
        first_stage: int = 1,
        out_channels: int = 256,
        extra_levels: str | None = None,
        frozen_stages: int = 0,
        norm_eval: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        if frozen_stages not in range(5):
            raise ValueError(f"frozen_stages must be from 0 to 4, got {frozen_stages!r}")
        if extra_levels not in (None, "pool", "convolutions"):
            raise ValueError(f"extra_levels must be None, pool or convolutions, got {extra_levels!r}")
        stages = tuple(range(first_stage, 5))
        self.body = timm.create_model(name, features_only=True, out_indices=stages, **kwargs)
        channels = self.body.feature_info.channels()
        extra: ExtraFPNBlock | None = LastLevelMaxPool() if extra_levels == "pool" else None
        if extra_levels == "convolutions":
            extra = ExtraConvolutions(channels[-1], out_channels)
        self.fpn = feature_pyramid(channels, out_channels, layer, extra, name)
        self.out_channels = out_channels
        self.strides: list[int] = list(self.body.feature_info.reduction())
        for _ in range({None: 0, "pool": 1, "convolutions": 2}[extra_levels]):
            self.strides.append(2 * self.strides[-1])
        self.norm_eval = norm_eval
        parts = [part for part, _ in self.body.named_children()]
        self._frozen = parts[: parts.index(f"layer{frozen_stages}") + 1] if frozen_stages else []
        for part in self._frozen:
            self.body.get_submodule(part).requires_grad_(False)

    def train(self, mode: bool = True) -> "PyramidBackbone":
        """As usual, but for frozen stages and for the norms that stay in evaluation mode."""
        super().train(mode)
        for part in self._frozen:
            self.body.get_submodule(part).eval()
        if mode and self.norm_eval:
            for module in self.body.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self

    def forward(self, images: Tensor) -> "OrderedDict[str, Tensor]":
        """[N, 3, H, W] -> levels, from the finest."""
        levels = OrderedDict((str(index), level) for index, level in enumerate(self.body(images)))
        result: OrderedDict[str, Tensor] = self.fpn(levels)
        return result
