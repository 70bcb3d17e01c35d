"""A start from a ResNet's weights: RedNet shares its 1x1 convolutions, norms, shortcuts and classifier."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import timm
import torch
from torch import Tensor, nn

from .checkpoints import read_weights

_ANCHOR = "layer1.0.conv1.weight"  # which every ResNet and RedNet has; what stands before it is a prefix
# The deep stem of timm's resnet50c and 50d, and the norm behind any stem, as RedNet names them.
_STEM = {
    "conv1.0": "stem.conv1",
    "conv1.1": "stem.bn1",
    "conv1.3": "stem.conv2",
    "conv1.4": "stem.bn2",
    "conv1.6": "stem.conv3",
    "bn1": "stem.bn3",
}


class WarmStart(NamedTuple):
    """What `load_resnet` did.

    `copied` and `new` have the names of the model's tensors that are the source's and those that are as they were,
    `left_out` those of the source's tensors that found no place; `parameters` counts elements: copied, and all.
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
    """Copies into a RedNet, in place, every tensor of a ResNet that fits by name and shape.

    These are the blocks' 1x1 convolutions, norms and shortcuts, the classifier where it has as many classes, and of
    the stem its last norm; all but the stem's involution where the source's stem is of three 3x3 convolutions
    (timm's resnet50c, resnet50d). Involutions stay as they are. Depths should agree: RedNet-50, 101 and 152 take the
    weights of timm's or torchvision's ResNet of that depth, RedNet-26 and 38 those of resnet26_paper and
    resnet38_paper. The shortcuts of resnet50d and its like, which average first, fit too. Weights of another RedNet
    are copied in the same way.

    Args:
        model: a RedNet, a ResNet, or what timm.create_model makes of one with features_only.
        source: a file (a checkpoint of `involution fit`, a state dict, .safetensors), or else the name of a network
            whose pretrained weights timm downloads; or a state dict. A prefix that all names share is taken off.

    Returns:
        What was copied, what is new and what was left out; its string is a report.

    Raises:
        TypeError: source is none of these.
        FileNotFoundError: source is neither a file nor a name that timm knows.
        ValueError: the file or the download is not to be read; model or source is no ResNet or RedNet; no
            convolution of the source's blocks fits.
    """
    weights, name = _weights(source)
    wanted = model.state_dict()
    if _ANCHOR not in wanted:
        raise ValueError(f"model must be a RedNet or a ResNet, got {type(model).__name__}")
    placed: dict[str, str] = {}  # the model's name of a tensor: the source's
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
    """The source's tensors without their common prefix, and what errors call it."""
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
    if not timm.is_model(name.partition(".")[0]):  # a name may end with a tag: resnet50.a1_in1k
        raise FileNotFoundError(f"source must be a file of weights or the name of a network of timm's, got {name}")
    try:
        with torch.random.fork_rng(devices=[]):
            state: dict[str, Tensor] = timm.create_model(name, pretrained=True).state_dict()
    except Exception as error:  # of timm where there are no weights, of the hub's and the network's many libraries
        raise ValueError(f"source must have weights that timm can download, got {name}: {error}") from error
    return state


def _names(theirs: str) -> Iterable[str]:
    """What RedNet may call a tensor of a ResNet, the likeliest first."""
    yield theirs
    module, _, tensor = theirs.rpartition(".")
    if module in _STEM:
        yield f"{_STEM[module]}.{tensor}"
    block, found, place = module.partition(".downsample.")
    if found and place in "12":  # 0 is pooling
        yield f"{block}{found}{int(place) - 1}.{tensor}"


def _layers(names: Iterable[str]) -> str:
    """Names of tensors as those of their layers; blocks have one entry together, and their number."""
    layers = dict.fromkeys(name.rpartition(".")[0] for name in names)
    kinds = Counter(re.sub(r"^layer\d+\.\d+\.", "layer*.*.", layer) for layer in layers)
    return ", ".join(f"{kind} ({count})" if "*" in kind else kind for kind, count in kinds.items()) or "nothing"
