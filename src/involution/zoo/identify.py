"""Finds the network and the task of a file of weights: by what our checkpoints carry, else by names and shapes."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from torch import Tensor, nn

from .checkpoints import SOURCES, Checkpoint, body, check, read_checkpoint
from .official import is_segmenter, is_whole
from .rednet import DEPTHS


class Identity(NamedTuple):
    """A name in timm's registry, and arguments of timm.create_model."""

    name: str
    arguments: dict[str, Any]

    def __str__(self) -> str:
        """The arguments as they are written in a call of timm.create_model."""
        return ", ".join([f'"{self.name}"', *(f"{name}={value!r}" for name, value in self.arguments.items())])


def identify(weights: Mapping[str, Tensor], source: str) -> Identity:
    """The RedNet that weights belong to.

    The numbers of blocks in the stages give the depth; a rednetv2 has no batch norm in its generators; the small
    networks for 32x32 images have a stem of 32 channels. Arguments that are not the default come from shapes:
    stem_kernel_size and in_chans from the stem's, num_classes from the classifier's (0 without one).

    Args:
        weights: by our names.
        source: their name in errors.

    Raises:
        ValueError: no RedNet has these blocks.
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
    """The arguments of timm.create_model that are not the default."""
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
    """Builds the classifier or backbone that a file holds weights of, and fills it; it is in evaluation mode.

    Args:
        file: a checkpoint of `involution fit`, or a RedNet's weights: ours, the official repository's or PaddleClas's.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds no weights, or a detector's or segmenter's; or tensors are missing, unexpected or of
            another shape.
    """
    found = classifier(read_checkpoint(Path(file)), str(file))
    network: nn.Module = timm.create_model(found.name, **found.arguments)
    network.load_state_dict(found.weights)
    return network.eval()


def task_of(content: Checkpoint) -> str:
    """The package of `involution.tasks` that a file's network is for; "own" if its module class is another package's.

    Our checkpoints name their module class. Of other files, names of parts tell detectors and segmenters.
    """
    named = content.record.get("involution", {}).get("module")
    if named is not None:
        inside = re.match(r"involution\.tasks\.(\w+)\.", str(named))
        return inside[1] if inside else "own"
    if not is_whole(content.weights):
        return "classify"
    return "segment" if is_segmenter(content.weights) else "detect"


class Classifier(NamedTuple):
    """A network of timm's registry: its name, arguments of timm.create_model, all of its tensors, and its classes."""

    name: str
    arguments: dict[str, Any]
    weights: dict[str, Tensor]
    classes: list[str] | None


def classifier(content: Checkpoint, source: str, backbone: bool = False) -> Classifier:
    """The classifier or backbone that a file holds; its tensors are checked against that network's.

    Args:
        content: of the file.
        source: the file's name in errors.
        backbone: take the backbone alone, also from a detector or segmenter.

    Raises:
        ValueError: it holds a detector or segmenter, and `backbone` is False; or tensors are missing, unexpected or of
            another shape.
    """
    weights, classes, record = content
    if backbone:
        weights, classes, record = body(weights), None, {}
    elif (task := task_of(content)) not in ("classify", "own"):
        raise ValueError(f"weights must be of a classifier or backbone, got {source}, whose task is {task}")
    given = record.get("hyper_parameters", {})
    if "model_name" in given:
        sizes = {"num_classes": given["num_classes"]} if "num_classes" in given else {}
        options = (given.get("model_kwargs") or {}).items()
        found = Identity(given["model_name"], sizes | {name: one for name, one in options if name not in SOURCES})
    else:
        found = identify(weights, source)
    with torch.device("meta"):
        wanted = timm.create_model(found.name, **found.arguments).state_dict()
    check(weights, wanted, f"weights must be those of {found.name}, got {source}")
    return Classifier(found.name, found.arguments, weights, classes)
