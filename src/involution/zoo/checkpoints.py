"""Loads weights from files into networks; an error names every tensor that does not fit.

Files are checkpoints of `involution fit`, state dicts (.pt, .pth), .safetensors, and other people's: the official
repository's (mmcls, mmdet 2.x, mmseg 0.x) and PaddleClas's. No code in a file is executed.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from timm.models import adapt_input_conv
from torch import Tensor, nn

from .official import is_whole, name_in_detector, our_name, renamed
from .paddle import read_pdparams

_CLASSIFIER = ("fc.", "head.fc.", "classifier.")  # the last layer, which backbones lack
_BODIES = ("backbone.body.", "pyramid.body.", "body.")  # the backbone in our detectors and segmenters
# Options of timm.create_model that read weights from elsewhere, which a file of weights must not decide.
SOURCES = ("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir")
RECORD = "involution"  # the metadata entry of a .safetensors file with the record of our checkpoints, as JSON


def checkpoint_or_name(model: str, pretrained: bool) -> Path | None:
    """The file if `model` is a checkpoint; None if it is the name of a network of timm's.

    Args:
        model: the option's value.
        pretrained: whether to download weights, which only a name has.

    Raises:
        FileNotFoundError: model looks like a file, but there is none.
        ValueError: model is neither; or is a checkpoint, with pretrained.
    """
    if Path(model).is_file():
        if pretrained:
            raise ValueError(f"pretrained is for names of timm's, got the checkpoint {model}")
        return Path(model)
    if timm.is_model(model.partition(".")[0]):
        return None
    if Path(model).suffix:
        raise FileNotFoundError(f"model must be a checkpoint of involution fit, got {model}, which is no file")
    raise ValueError(f"model must be a checkpoint of involution fit or the name of a network of timm's, got {model!r}")


class Checkpoint(NamedTuple):
    """What a file of weights holds.

    `weights` are the network's tensors by our names. Of a detector or segmenter of mmdet or mmseg, only the backbone's
    are renamed, to backbone.body...; other parts keep the file's names. `classes` are the classes' names, if the file
    has them. `record` has the entries `hyper_parameters` and `involution` of our own checkpoints; for other files it is
    empty.
    """

    weights: dict[str, Tensor]
    classes: list[str] | None
    record: dict[str, Any]


def read_checkpoint(file: Path) -> Checkpoint:
    """Reads a file of weights, of any kind that this module's docstring lists.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is of another kind, would execute code, or names a tensor twice.
    """
    if not file.is_file():
        raise FileNotFoundError(f"weights must be a file, got {file}")
    if file.suffix == ".pdparams":
        return Checkpoint(renamed(read_pdparams(file), our_name, file), None, {})
    content, record = _content(file)
    classes = None
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        carried = {name: content.get(name) for name in ("hyper_parameters", "involution")}
        record = {name: value for name, value in carried.items() if isinstance(value, dict)} or record
        classes = _classes(content.get("meta"))
        content = content["state_dict"]
    if not (isinstance(content, dict) and content and all(isinstance(one, Tensor) for one in content.values())):
        raise ValueError(f"weights must be a checkpoint or a state dict, got {file}, which contains something else")
    network = {name.removeprefix("net."): one for name, one in content.items() if name.startswith("net.")}
    weights = renamed(network or content, name_in_detector if is_whole(content) else our_name, file)
    return Checkpoint(weights, record.get("involution", {}).get("classes", classes), record)


def read_weights(file: Path) -> dict[str, Tensor]:
    """The network's tensors by our names: see `Checkpoint`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds no weights, would execute code, or names a tensor twice.
    """
    return read_checkpoint(file).weights


def body(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The backbone's tensors, by their names in a network that is only the backbone; a classifier's are left out."""
    prefix = next((one for one in _BODIES if any(name.startswith(one) for name in weights)), "")
    return {
        name.removeprefix(prefix): one
        for name, one in weights.items()
        if name.startswith(prefix) and not name.startswith(_CLASSIFIER)
    }


def load_backbone(module: nn.Module, file: Path, network: str) -> list[str]:
    """Fills a backbone with the weights of a classifier, or of the backbone of a detector or segmenter.

    Args:
        module: made by timm with features_only.
        file: see `read_checkpoint`; a classifier's last layer, and everything outside the backbone, is ignored.
        network: the name of the backbone's network, for errors.

    Returns:
        The names of the ignored tensors.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: its tensors are not exactly the network's, by name and shape.
    """
    weights, _, record = read_checkpoint(file)
    kept = body(weights)
    given = record.get("hyper_parameters", {})
    other = given.get("backbone", given.get("model_name", "a network that it does not name"))
    check(kept, module.state_dict(), f"backbone_weights must be of the backbone, {network}, got {file} of {other}")
    module.load_state_dict(kept)
    prefix = next((one for one in _BODIES if any(name.startswith(one) for name in weights)), "")
    return [name for name in weights if name.removeprefix(prefix) not in kept]


def load_network(network: nn.Module, file: Path) -> list[str]:
    """Fills a classifier with another one's weights.

    Args:
        network: a timm model.
        file: see `read_checkpoint`; the last layer is left out where it is for another number of classes.

    Returns:
        The names of the ignored tensors.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: its tensors are not exactly the network's, by name and shape.
    """
    weights, own = read_weights(file), network.state_dict()
    left_out = [
        name
        for name, one in weights.items()
        if name.startswith(_CLASSIFIER) and name in own and own[name].shape != one.shape
    ]
    weights |= {name: own[name] for name in left_out}
    check(weights, own, f"checkpoint_path must fit the model, got {file}")
    network.load_state_dict(weights)
    return left_out


def load_published(network: nn.Module, file: Path) -> None:
    """Fills a RedNet with published weights; timm calls this for `pretrained=True`, after the download.

    The last layer stays as it is where the network has another number of classes or none; the first convolution is
    adapted to another number of input channels.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it lacks tensors, has others or of other shapes.
    """
    weights, own = read_weights(file), network.state_dict()
    first: Any = network.get_submodule("stem.conv1")
    if "stem.conv1.weight" in weights:
        weights["stem.conv1.weight"] = adapt_input_conv(first.in_channels, weights["stem.conv1.weight"])
    classes = len(own["fc.bias"]) if "fc.bias" in own else 0
    if any(len(weights[name]) != classes for name in ("fc.weight", "fc.bias") if name in weights):
        weights = {name: one for name, one in weights.items() if not name.startswith(_CLASSIFIER)}
        weights |= {name: one for name, one in own.items() if name.startswith(_CLASSIFIER)}
    check(weights, own, f"pretrained weights must fit the model, got {file}")
    network.load_state_dict(weights)


def check(weights: Mapping[str, Tensor], wanted: Mapping[str, Tensor], complaint: str) -> None:
    """Raises unless the weights are exactly a module's tensors, by name and shape.

    Args:
        weights: by name.
        wanted: the module's state dict.
        complaint: the beginning of the error's message.

    Raises:
        ValueError: tensors are missing, unexpected or of another shape, in one message.
    """
    shapes = [
        f"{name} {list(one.shape)} for {list(wanted[name].shape)}"
        for name, one in weights.items()
        if name in wanted and one.shape != wanted[name].shape
    ]
    problems = {
        "missing": [name for name in wanted if name not in weights],
        "unexpected": [name for name in weights if name not in wanted],
        "of another shape": shapes,
    }
    if any(problems.values()):
        found = "; ".join(f"{kind}: {_some(names)}" for kind, names in problems.items() if names)
        raise ValueError(f"{complaint}: {found}")


def _content(file: Path) -> tuple[Any, dict[str, Any]]:
    """The content of a file of torch's or of safetensors, and the record in the latter's metadata."""
    try:
        if file.suffix == ".safetensors":
            from safetensors import safe_open

            with safe_open(file, framework="pt") as opened:
                record = _record((opened.metadata() or {}).get(RECORD, "{}"))
                return {name: opened.get_tensor(name) for name in opened.keys()}, record  # noqa: SIM118  (no mapping)
        return torch.load(file, map_location="cpu", weights_only=True), {}
    except Exception as error:  # torch raises errors of many kinds for other files
        raise ValueError(f"weights must be a checkpoint or a state dict, got {file}: {error!r}") from error


def _record(text: str) -> dict[str, Any]:
    """The record of our checkpoints, from JSON. JSON has no tuples, which preprocessing and colours are."""
    record: dict[str, Any] = json.loads(text)
    carried = record.get("involution", {})
    for name, value in (carried.get("preprocessing") or {}).items():
        if isinstance(value, list):
            carried["preprocessing"][name] = tuple(value)
    if "palette" in carried:
        carried["palette"] = [tuple(colour) for colour in carried["palette"]]
    return record


def _classes(meta: Any) -> list[str] | None:
    """The classes' names that mmcls, mmdet and mmseg keep with the weights."""
    names = meta.get("CLASSES") if isinstance(meta, dict) else None
    return [str(name) for name in names] if isinstance(names, list | tuple) and names else None


def _some(names: list[str]) -> str:
    rest = f" and {len(names) - 20} more" if len(names) > 20 else ""
    return ", ".join(names[:20]) + rest
