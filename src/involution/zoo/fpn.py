"""torchvision's feature pyramid network with involutions in place of its 3x3 convolutions (paper, section 4.2)."""

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
    """Raises ValueError unless `value` is "convolution" or "involution"."""
    if value not in LAYERS:
        raise ValueError(f"{name} must be convolution or involution, got {value!r}")


class GeneratorBatchNorm2d(nn.BatchNorm2d):
    """Batch norm that falls back to its running statistics in training if a batch has one value per channel.

    The variance of one value is 0, and torch's batch norm raises ValueError. It happens with one small image per batch,
    whose coarsest pyramid level is one pixel. The running statistics are not updated then. Everything else, including
    the state dict, is torch's; so is the error if no running statistics are tracked.
    """

    def forward(self, input: Tensor) -> Tensor:
        """[N, C, H, W] -> the same."""
        if self.training and self.running_mean is not None and (*input.shape[:1], *input.shape[2:]) == (1, 1, 1):
            return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        return super().forward(input)


def involution_layer(channels: int, backbone: str) -> Involution2d:
    """The 7x7 involution that replaces a 3x3 convolution in necks and heads, initialised as the identity.

    On the paper's networks, rednet26 to rednet152, its kernel generator has a batch norm, as published (a
    `GeneratorBatchNorm2d`, for levels of one pixel). On all others it is the default generator.

    Args:
        channels: of input and output.
        backbone: the name of the backbone.
    """
    papers = backbone.startswith("rednet") and not backbone.startswith("rednetv2_")
    return Involution2d(channels, norm_layer=GeneratorBatchNorm2d if papers else None)


class ExtraConvolutions(LastLevelP6P7):
    """RetinaNet's levels P6 and P7, by convolutions of stride 2 from the last stage, without a ReLU between them.

    torchvision has a ReLU before P7; the published networks have none.
    """

    def forward(self, p: list[Tensor], c: list[Tensor], names: list[str]) -> tuple[list[Tensor], list[str]]:
        """Pyramid levels and backbone stages, finest first -> the levels with P6 and P7, and their names."""
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

    Convolutions are initialised by Xavier uniform, as published (torchvision: Kaiming uniform).

    Args:
        in_channels: of the input levels, finest first.
        out_channels: of every output level; a multiple of 16 for involution.
        layer: "convolution" or "involution".
        extra_blocks: adds coarser levels, as in torchvision.
        backbone: the backbone's name, which selects the involutions' generator: see `involution_layer`.

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
    """A timm network with a feature pyramid on its stages, in the interface of torchvision's detectors.

    Args:
        name: a name of timm's registry; its feature levels are a stem and four stages, as RedNet's and ResNet's.
        layer: of the pyramid, see `feature_pyramid`.
        first_stage: the finest stage in the pyramid: 1 (stride 4) or 2 (stride 8).
        out_channels: of every level.
        extra_levels: coarser levels: "pool" adds one by pooling (R-CNNs), "convolutions" two by convolutions of stride
            2 from the last stage (RetinaNet), None adds none.
        frozen_stages: the number of stages that, with the stem, are not trained and stay in evaluation mode; 0 trains
            everything, including the stem.
        norm_eval: the network's batch norms always use, and never update, their running statistics.
        **kwargs: further arguments of timm.create_model.

    Shapes: [N, 3, H, W] -> an OrderedDict of levels [N, out_channels, h, w], finest first; `strides` has their strides
    in image pixels.

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
        """Sets the mode, except for frozen stages and, with norm_eval, norms, which stay in evaluation mode."""
        super().train(mode)
        for part in self._frozen:
            self.body.get_submodule(part).eval()
        if mode and self.norm_eval:
            for module in self.body.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self

    def forward(self, images: Tensor) -> "OrderedDict[str, Tensor]":
        """[N, 3, H, W] -> levels, finest first."""
        levels = OrderedDict((str(index), level) for index, level in enumerate(self.body(images)))
        result: OrderedDict[str, Tensor] = self.fpn(levels)
        return result
