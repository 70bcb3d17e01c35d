"""RedNet's convolutional counterparts: timm's ResNet at the same depths, widths and input sizes.

Registers resnet26_paper and resnet38_paper (timm's resnet26 has depths 2, 2, 2, 2 and is a different network; the
counterparts of RedNet-50, 101 and 152 are timm's resnet50, resnet101 and resnet152), and resnet14_cifar and
resnet26_cifar for images of 32x32. No weights exist for them: `pretrained=True` raises timm's own RuntimeError.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import timm
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs
from timm.models import register_model as _register_model
from timm.models.resnet import Bottleneck, ResNet
from torch import nn

__all__ = ["CifarResNet"]  # timm adds the entry points' names

EntryPoint = TypeVar("EntryPoint", bound=Callable[..., nn.Module])
register_model: Callable[[EntryPoint], EntryPoint] = _register_model  # timm ships without types


class CifarResNet(ResNet):
    """timm's ResNet for images of 32x32: the stem is one 3x3 convolution, without pooling.

    Args:
        in_chans: channels of the image.
        output_stride: 8, 16 or 32, at least 8 * stem_stride; the network never dilates.
        stem_width: half the stem's output channels, as in timm's deep stems.
        stem_stride: 1 or 2.
        **kwargs: the other arguments of timm's ResNet.

    Raises:
        ValueError: output_stride or stem_stride does not fit.
    """

    def __init__(
        self,
        *args: Any,
        in_chans: int = 3,
        output_stride: int = 32,
        stem_width: int = 16,
        stem_stride: int = 1,
        **kwargs: Any,
    ) -> None:
        if stem_stride not in (1, 2):
            raise ValueError(f"stem_stride must be 1 or 2, got {stem_stride!r}")
        strides = (8, 16, 32)[stem_stride - 1 :]
        if output_stride not in strides:
            raise ValueError(f"output_stride must be one of {strides}, got {output_stride!r}")
        # timm's deep stem is the one with a free output width; only its norm and activation are kept.
        super().__init__(*args, in_chans=in_chans, stem_width=stem_width, stem_type="deep", **kwargs)
        factory_kwargs: dict[str, Any] = {name: kwargs.get(name) for name in ("device", "dtype")}
        self.conv1 = nn.Conv2d(in_chans, 2 * stem_width, 3, stride=stem_stride, padding=1, bias=False, **factory_kwargs)
        nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")  # as timm's other convolutions
        self.maxpool = nn.Identity()
        for info in self.feature_info:
            info["reduction"] = max(stem_stride, stem_stride * info["reduction"] // 4)


def counterpart(name: str) -> str | None:
    """The convolutional counterpart of a RedNet in timm's registry, or None."""
    if not name.startswith("rednet"):
        return None
    same = name.replace("rednetv2_", "resnet").replace("rednet", "resnet")
    paper = f"{same}_paper"  # timm's resnet26 has other depths
    return paper if timm.is_model(paper) else same if timm.is_model(same) else None


def _cfg(**entries: Any) -> dict[str, Any]:
    """timm's default_cfg of a variant; without a url, because there are no weights to download."""
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bilinear",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "conv1",
        "classifier": "fc",
        **entries,
    }


def _cifar_cfg() -> dict[str, Any]:
    return _cfg(
        num_classes=10,
        input_size=(3, 32, 32),
        pool_size=(4, 4),
        crop_pct=1.0,
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
    )


default_cfgs = generate_default_cfgs(
    {
        "resnet26_paper": _cfg(),
        "resnet38_paper": _cfg(),
        "resnet14_cifar": _cifar_cfg(),
        "resnet26_cifar": _cifar_cfg(),
    }
)


def _resnet(variant: str, pretrained: bool, **kwargs: Any) -> ResNet:
    return build_model_with_cfg(ResNet, variant, pretrained, **{"block": Bottleneck, **kwargs})


def _cifar_resnet(variant: str, pretrained: bool, **kwargs: Any) -> CifarResNet:
    small = {"block": Bottleneck, "channels": (16, 32, 64, 128)}
    model: CifarResNet = build_model_with_cfg(CifarResNet, variant, pretrained, **{**small, **kwargs})
    return model


@register_model
def resnet26_paper(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """ResNet-26 of the paper's comparison: bottlenecks at depths 1, 2, 4, 1; 13.70 M parameters."""
    return _resnet("resnet26_paper", pretrained, **{"layers": (1, 2, 4, 1), **kwargs})


@register_model
def resnet38_paper(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """ResNet-38 of the paper's comparison: bottlenecks at depths 2, 3, 5, 2; 19.63 M parameters."""
    return _resnet("resnet38_paper", pretrained, **{"layers": (2, 3, 5, 2), **kwargs})


@register_model
def resnet14_cifar(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """The counterpart of rednet14_cifar: the same depths and widths, a 3x3 convolution of stride 1 as the stem."""
    return _cifar_resnet("resnet14_cifar", pretrained, **{"layers": (1, 1, 1, 1), **kwargs})


@register_model
def resnet26_cifar(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """The counterpart of rednet26_cifar: the same depths and widths, a 3x3 convolution of stride 1 as the stem."""
    return _cifar_resnet("resnet26_cifar", pretrained, **{"layers": (1, 2, 4, 1), **kwargs})
