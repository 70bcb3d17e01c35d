"""Maps the official RedNet's tensor names, those of mmcls, mmdet 2.x, mmseg 0.x and PaddleClas, to ours.

Source: github.com/d-li14/involution, {cls/mmcls,det/mmdet,seg/mmseg}/models/backbones/rednet.py, and PaddleClas,
ppcls/arch/backbone/model_zoo/rednet.py.
"""

import re
from collections.abc import Callable, Mapping

from torch import Tensor

_SEGMENTERS = ("decode_head.", "auxiliary_head.")
# What detectors and segmenters of mmdet and mmseg have besides their backbone.
PARTS = ("neck.", "rpn_head.", "roi_head.", "bbox_head.", *_SEGMENTERS)
_INVOLUTION = (
    (r"conv1\.conv\.", "generator.reduce."),
    (r"conv1\.bn\.", "generator.norm."),
    (r"conv2\.(?:conv\.)?(?=weight$|bias$)", "generator.span."),
)
_STEM = {"stem.0.conv": "stem.conv1", "stem.0.bn": "stem.bn1", "stem.2": "stem.bn2"}
_STEM |= {"stem.4.conv": "stem.conv3", "stem.4.bn": "stem.bn3"}
_LAYER = re.compile(r"(stem\.1|layer\d+\.\d+\.conv2)\.(?=conv[12]\.)")
_BACKBONE = re.compile(r"backbone\.(?=stem\.|layer\d|conv1\.|bn1\.)")  # and not our own backbone.body, backbone.fpn


def involution_name(name: str) -> str:
    """Our name of an involution layer's tensor: conv1.conv.weight -> generator.reduce.weight; other names stay."""
    for pattern, ours in _INVOLUTION:
        found = re.match(pattern, name)
        if found:
            return ours + name[found.end() :]
    return name


def rednet_name(name: str) -> str:
    """Our name of a backbone's tensor: stem.0.conv.weight -> stem.conv1.weight; other names, ours too, stay."""
    found = _LAYER.match(name)
    if found:
        layer = "stem.conv2" if found[1] == "stem.1" else found[1]
        return f"{layer}.{involution_name(name[found.end() :])}"
    module, _, tensor = name.rpartition(".")
    return f"{_STEM[module]}.{tensor}" if module in _STEM else name


def is_whole(weights: Mapping[str, Tensor]) -> bool:
    """Whether these are the weights of a detector or segmenter of mmdet or mmseg, not of a classifier or backbone."""
    return any(name.startswith(PARTS) for name in weights)


def is_segmenter(weights: Mapping[str, Tensor]) -> bool:
    """Whether these are the weights of a segmenter of mmseg."""
    return any(name.startswith(_SEGMENTERS) for name in weights)


def our_name(name: str) -> str:
    """Our name of a classifier's or backbone's tensor, with the prefixes backbone. and head. or without."""
    found = _BACKBONE.match(name)
    if found:
        return rednet_name(name[found.end() :])
    return name.removeprefix("head.") if name.startswith("head.fc.") else rednet_name(name)


def name_in_detector(name: str) -> str:
    """The backbone's name in our detectors: backbone.stem.2.bias -> backbone.body.stem.bn2.bias; other names stay."""
    found = _BACKBONE.match(name)
    return f"backbone.body.{rednet_name(name[found.end() :])}" if found else name


def renamed(weights: Mapping[str, Tensor], rename: Callable[[str], str], file: object) -> dict[str, Tensor]:
    """The same tensors under other names.

    Args:
        weights: by name.
        rename: maps an old name to the new one.
        file: their name in errors.

    Raises:
        ValueError: two tensors have the same new name.
    """
    result: dict[str, Tensor] = {}
    origin: dict[str, str] = {}
    for name, tensor in weights.items():
        ours = rename(name)
        if ours in result:
            raise ValueError(f"weights must hold every tensor once, got {file}, with both {origin[ours]} and {name}")
        result[ours], origin[ours] = tensor, name
    return result


def fpn_name(name: str, laterals: int) -> str:
    """torchvision's name of a tensor of mmdet's or mmseg's FPN: lateral_convs.0.conv.bias -> inner_blocks.0.0.bias.

    Args:
        name: without the prefix neck.
        laterals: the number of levels from the backbone; further convolutions compute RetinaNet's coarser levels.
    """
    found = re.fullmatch(r"(lateral_convs|fpn_convs)\.(\d+)\.(.+)", name)
    if not found:
        return name
    block, index, rest = found[1], int(found[2]), found[3]
    convolution, tensor = rest.startswith("conv."), rest.removeprefix("conv.")
    if block == "lateral_convs":
        return f"inner_blocks.{index}.0.{tensor}"
    if index >= laterals:
        return f"extra_blocks.p{6 + index - laterals}.{tensor}"
    return f"layer_blocks.{index}.{'0.' + tensor if convolution else involution_name(rest)}"


def count_laterals(weights: Mapping[str, Tensor]) -> int:
    """The number of backbone levels that an FPN reads."""
    return len({name.split(".")[2] for name in weights if name.startswith("neck.lateral_convs.")})
