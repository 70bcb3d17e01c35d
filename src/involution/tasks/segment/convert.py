"""mmseg 0.x's semantic FPN and UPerNet on RedNet, with the published configurations, into ours."""

import re
from pathlib import Path
from typing import Any

from torch import Tensor

from ...engine.data import IMAGENET_MEAN, IMAGENET_STD
from ...zoo.checkpoints import body
from ...zoo.identify import identify
from ...zoo.official import count_laterals, fpn_name, renamed
from .module import Segmenter
from .preprocessing import Preprocessing

_HEIGHT = 1024  # of Cityscapes' images, on which the published networks were trained
_PARTS = {"conv": "0", "bn": "1"}  # of a block
_SEMANTIC_FPN = ((re.compile(r"decode_head\.scale_heads\.(\d+\.\d+)\.(conv|bn)\."), "branches.{}.{}."),)
_UPERNET = (
    (re.compile(r"decode_head\.psp_modules\.(\d+\.1)\.(conv|bn)\."), "pooling.pools.{}.{}."),
    (re.compile(r"decode_head\.bottleneck()\.(conv|bn)\."), "pooling.join{}.{}."),
    (re.compile(r"decode_head\.lateral_convs\.(\d+)\.(conv|bn)\."), "laterals.{}.{}."),
    (re.compile(r"decode_head\.fpn_convs\.(\d+)\.(conv|bn)\."), "smooth.{}.{}."),
    (re.compile(r"decode_head\.fpn_bottleneck()\.(conv|bn)\."), "join{}.{}."),
    (re.compile(r"auxiliary_head\.convs\.0()\.(conv|bn)\."), "auxiliary{}.{}."),
)
_CLASSIFIERS = {"decode_head.conv_seg.": "classify.1.", "auxiliary_head.conv_seg.": "auxiliary.4."}

MODULE = Segmenter  # the class whose arguments `converted` returns


def converted(weights: dict[str, Tensor], file: Path) -> tuple[dict[str, Any], dict[str, Tensor], Preprocessing]:
    """Arguments of `Segmenter`, its network's tensors, and the preprocessing that the network was trained with.

    Args:
        weights: of mmseg, the backbone's by our names.
        file: their name in errors.

    Raises:
        ValueError: the backbone is no RedNet, or two tensors have the same name.
    """
    found = identify(body(weights), str(file))
    pyramid = any(name.startswith("neck.") for name in weights)
    laterals = count_laterals(weights)
    ours = renamed(weights, lambda name: _name(name, pyramid, laterals), file)
    kwargs = {name: value for name, value in found.arguments.items() if name != "num_classes"}
    arguments: dict[str, Any] = {"backbone": found.name, "backbone_kwargs": kwargs}
    arguments["num_classes"] = len(ours["classify.1.bias"]) if "classify.1.bias" in ours else 19
    if pyramid:
        involution = any(name.startswith("pyramid.fpn.layer_blocks.") and ".generator." in name for name in ours)
        arguments |= {"model_name": "semantic_fpn", "neck": "involution" if involution else "convolution"}
    else:
        auxiliary = any(name.startswith("auxiliary.") for name in ours)
        arguments |= {"model_name": "upernet", "model_kwargs": {} if auxiliary else {"auxiliary": False}}
    return arguments, ours, Preprocessing(_HEIGHT, IMAGENET_MEAN, IMAGENET_STD)


def _name(name: str, pyramid: bool, laterals: int) -> str:
    """Ours for mmseg's."""
    if name.startswith("backbone.body."):
        return f"pyramid.{name.removeprefix('backbone.')}" if pyramid else name.removeprefix("backbone.")
    if name.startswith("neck."):
        return f"pyramid.fpn.{fpn_name(name.removeprefix('neck.'), laterals)}"
    for prefix, ours in _CLASSIFIERS.items():
        if name.startswith(prefix):
            return ours + name.removeprefix(prefix)
    for pattern, ours in _SEMANTIC_FPN if pyramid else _UPERNET:
        found = pattern.match(name)
        if found:
            return ours.format(found[1], _PARTS[found[2]]) + name[found.end() :]
    return name
