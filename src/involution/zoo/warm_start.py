"""Warm start from a ResNet's weights: copies the 1x1 convolutions, norms, shortcuts and classifier into a RedNet."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import timm
import torch
from torch import Tensor, nn

from .checkpoints import read_weights

_ANCHOR = "layer1.0.conv1.weight"  # in every ResNet and RedNet; what precedes it in a state dict is a common prefix
# The deep stem of timm's resnet50c and 50d, and the norm after any stem -> RedNet's names.
_STEM = {
    "conv1.0": "stem.conv1",
    "conv1.1": "stem.bn1",
    "conv1.3": "stem.conv2",
    "conv1.4": "stem.bn2",
    "conv1.6": "stem.conv3",
    "bn1": "stem.bn3",
}


class WarmStart(NamedTuple):
    """The result of `load_resnet`.

    `copied` and `new` have the names of the model's tensors that were and were not copied, `left_out` those of the
    source's unused tensors; `parameters` counts elements: copied, and all.
    """

    source: str
    copied: list[str]
    new: list[str]
    left_out: list[str]
    parameters: tuple[int, int]

    def __str__(self) -> str:
        some, every = self.parameters
        tensors = f"{len(self.copied)} of {len(self.copied) + len(self.new)} tensors"
        return "\n".join(
            [
                f"warm start from {self.source}: {tensors}, {some:,} of {every:,} parameters ({some / every:.0%})",
                f"new: {_layers(self.new)}",
                f"left out: {_layers(self.left_out)}",
            ]
        )


def load_resnet(model: nn.Module, source: str | Path | Mapping[str, Tensor]) -> WarmStart:
    """Copies into a RedNet, in place, every tensor of a ResNet that matches by name and shape.

    These are the blocks' 1x1 convolutions, norms and shortcuts, the classifier if the number of classes is the same,
    and the stem's last norm; from a deep stem of three 3x3 convolutions (timm's resnet50c, resnet50d), all of the stem
    but its involution. Involutions keep their weights. Depths should agree: RedNet-50, 101 and 152 take the weights of
    timm's or torchvision's ResNet of that depth, RedNet-26 and 38 those of resnet26_paper and resnet38_paper. The
    average-pooling shortcuts of resnet50d fit too. Another RedNet's weights are copied in the same way.

    Args:
        model: a RedNet or ResNet, also as timm.create_model returns it with features_only.
        source: a file (a checkpoint of `involution fit`, a state dict, .safetensors), the name of a network whose
            pretrained weights timm downloads, or a state dict. A common prefix of all names is removed.

    Returns:
        The names that were copied, new and left out; its string is a report.

    Raises:
        TypeError: source is none of these.
        FileNotFoundError: source is neither a file nor the name of a network of timm's.
        ValueError: the file or the download cannot be read; model or source is not a ResNet or RedNet; no
            convolution of the source's blocks fits.
    """
    weights, name = _weights(source)
    wanted = model.state_dict()
    if _ANCHOR not in wanted:
        raise ValueError(f"model must be a RedNet or a ResNet, got {type(model).__name__}")
    placed: dict[str, str] = {}  # the model's name -> the source's
    for theirs, tensor in weights.items():
        for ours in _names(theirs):
            if ours in wanted and ours not in placed and wanted[ours].shape == tensor.shape:
                placed[ours] = theirs
                break
    if not any(ours.startswith("layer") and wanted[ours].dim() == 4 for ours in placed):
        raise ValueError(
            f"source must hold weights of a ResNet with bottlenecks as wide as the model's, got {name}, "
            f"where {_ANCHOR} is {list(weights[_ANCHOR].shape)} and not {list(wanted[_ANCHOR].shape)}"
        )
    model.load_state_dict({ours: weights[theirs] for ours, theirs in placed.items()}, strict=False)
    used, parameters = set(placed.values()), dict(model.named_parameters())
    return WarmStart(
        source=name,
        copied=[ours for ours in wanted if ours in placed],
        new=[ours for ours in wanted if ours not in placed],
        left_out=[theirs for theirs in weights if theirs not in used],
        parameters=(
            sum(one.numel() for ours, one in parameters.items() if ours in placed),
            sum(one.numel() for one in parameters.values()),
        ),
    )


def _weights(source: str | Path | Mapping[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """The source's tensors without their common prefix, and its name for messages."""
    if isinstance(source, Mapping):
        weights, name = dict(source), "the state dict"
    elif not isinstance(source, str | Path):
        raise TypeError(f"source must be a file, a name or a state dict, got {type(source).__name__}")
    elif Path(source).is_file():
        weights, name = read_weights(Path(source)), str(source)
    else:
        weights, name = _pretrained(str(source)), str(source)
    anchor = next((key for key in weights if key == _ANCHOR or key.endswith(f".{_ANCHOR}")), None)
    if anchor is None:
        raise ValueError(f"source must hold weights of a ResNet or RedNet, got {name}, which lacks {_ANCHOR}")
    prefix = anchor.removesuffix(_ANCHOR)
    return {key.removeprefix(prefix): one for key, one in weights.items() if key.startswith(prefix)}, name


def _pretrained(name: str) -> dict[str, Tensor]:
    if not timm.is_model(name.partition(".")[0]):  # a name may have a tag: resnet50.a1_in1k
        raise FileNotFoundError(f"source must be a file of weights or the name of a network of timm's, got {name}")
    try:
        with torch.random.fork_rng(devices=[]):
            state: dict[str, Tensor] = timm.create_model(name, pretrained=True).state_dict()
    except Exception as error:  # timm's without weights; the hub's and network libraries' own types
        raise ValueError(f"source must have weights that timm can download, got {name}: {error}") from error
    return state


def _names(theirs: str) -> Iterable[str]:
    """RedNet's possible names for a ResNet's tensor, the most likely first."""
    yield theirs
    module, _, tensor = theirs.rpartition(".")
    if module in _STEM:
        yield f"{_STEM[module]}.{tensor}"
    block, found, place = module.partition(".downsample.")
    if found and place in "12":  # 0 is pooling
        yield f"{block}{found}{int(place) - 1}.{tensor}"


def _layers(names: Iterable[str]) -> str:
    """A summary of tensors' names: their layers, with equal layers of all blocks as one entry and a count."""
    layers = dict.fromkeys(name.rpartition(".")[0] for name in names)
    kinds = Counter(re.sub(r"^layer\d+\.\d+\.", "layer*.*.", layer) for layer in layers)
    return ", ".join(f"{kind} ({count})" if "*" in kind else kind for kind, count in kinds.items()) or "nothing"
