"""Which network a file of weights is of: a RedNet by names and shapes, others by what our checkpoints carry."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from torch import Tensor, nn

from .checkpoints import Checkpoint, body, check, read_checkpoint
from .official import is_whole
from .rednet import DEPTHS


class Identity(NamedTuple):
    """A name in timm's registry, and arguments of timm.create_model."""

    name: str
    arguments: dict[str, Any]

    def __str__(self) -> str:
        """As a call of timm.create_model has them."""
        return ", ".join([f'"{self.name}"', *(f"{name}={value!r}" for name, value in self.arguments.items())])


def identify(weights: Mapping[str, Tensor], source: str) -> Identity:
    """The RedNet that weights are of.

    The depth is that of the blocks in each stage; rednetv2 has no norm in its generators; the small ones for 32x32
    images have a stem of 32 channels. Arguments are given where they are not the default: stem_kernel_size and in_chans
    by the shapes of the stem, num_classes by the classifier's, 0 without one.

    Args:
        weights: by our names.
        source: what errors call them.

    Raises:
        ValueError: the blocks are of no RedNet.
    """
    places = [name.split(".") for name in weights if name.startswith("layer")]
    blocks = {(stage, block) for stage, block, *_ in (place for place in places if len(place) > 2)}
    counts = tuple(sum(stage == f"layer{index}" for stage, _ in blocks) for index in range(1, 5))
    last = weights.get("stem.conv3.weight")
    small = last is not None and last.shape[0] == 32
    allowed = (14, 26) if small else (26, 38, 50, 101, 152)
    depth = next((depth for depth in allowed if DEPTHS[depth] == counts), None)
    if depth is None:
        known = ", ".join(f"{DEPTHS[one]} ({one})" for one in allowed)
        raise ValueError(f"weights must be of a RedNet, whose stages have {known} blocks, got {source}, with {counts}")
    family = "rednet" if any(".generator.norm." in name for name in weights) else "rednetv2_"
    name = f"{family}{depth}{'_cifar' if small else ''}"
    return Identity(name, _arguments(weights, 10 if small else 1000))


def _arguments(weights: Mapping[str, Tensor], num_classes: int) -> dict[str, Any]:
    """Those that are not the default."""
    found: dict[str, Any] = {}
    first, span = weights.get("stem.conv1.weight"), weights.get("stem.conv2.generator.span.weight")
    if first is not None and first.dim() == 4 and span is not None:
        taps = span.shape[0] / (first.shape[0] / 16)  # a kernel for every 16 channels
        if math.isqrt(int(taps)) == 7:
            found["stem_kernel_size"] = 7
        if first.shape[1] != 3:
            found["in_chans"] = first.shape[1]
    classifier = next((weights[name] for name in ("fc.weight", "fc.bias") if name in weights), None)
    classes = 0 if classifier is None else classifier.shape[0]
    return found | ({} if classes == num_classes else {"num_classes": classes})


def load_checkpoint(file: str | Path) -> nn.Module:
    """The classifier or the backbone that a file's weights are of, filled with them, in evaluation mode.

    Args:
        file: of a RedNet: our own, the official repository's or PaddleClas's; see `identify` for what is found out.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds no weights, or others than a RedNet's; missing, unexpected and mis-shaped ones are named.
    """
    found = classifier(read_checkpoint(Path(file)), str(file))
    network: nn.Module = timm.create_model(found.name, **found.arguments)
    network.load_state_dict(found.weights)
    return network.eval()


class Classifier(NamedTuple):
    """A network of timm's registry: its name, arguments of timm.create_model, all of its tensors, and its classes."""

    name: str
    arguments: dict[str, Any]
    weights: dict[str, Tensor]
    classes: list[str] | None


def classifier(content: Checkpoint, source: str, backbone: bool = False) -> Classifier:
    """What classifier or backbone a file holds, its tensors checked against those of that network.

    Args:
        content: of the file.
        source: what errors call it.
        backbone: take the backbone alone, of whatever the file holds.

    Raises:
        ValueError: it holds a detector or segmenter, and `backbone` is False; or tensors are missing, unexpected or of
            another shape.
    """
    weights, classes, record = content
    if backbone:
        weights, classes, record = body(weights), None, {}
    elif is_whole(weights) or record.get("involution", {}).get("task", "classify") != "classify":
        raise ValueError(f"weights must be of a classifier or backbone, got {source}, of a detector or segmenter")
    given = record.get("hyper_parameters", {})
    if "model_name" in given:
        sizes = {"num_classes": given["num_classes"]} if "num_classes" in given else {}
        found = Identity(given["model_name"], sizes | (given.get("model_kwargs") or {}))
    else:
        found = identify(weights, source)
    with torch.device("meta"):
        wanted = timm.create_model(found.name, **found.arguments).state_dict()
    check(weights, wanted, f"weights must be those of {found.name}, got {source}")
    return Classifier(found.name, found.arguments, weights, classes)
