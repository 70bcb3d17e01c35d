"""Loads weights from files into networks; errors name every key that does not fit."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

_CLASSIFIER = ("fc.", "head.fc.", "classifier.")  # the last layer, which backbones lack
_BODIES = ("backbone.body.", "pyramid.body.", "body.")  # the backbone in our detectors and segmenters


def read_weights(file: Path) -> dict[str, Tensor]:
    """The network's tensors by name, from a checkpoint of `involution fit`, a state dict (.pt, .pth) or .safetensors.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is none of these.
    """
    if not file.is_file():
        raise FileNotFoundError(f"weights must be a file, got {file}")
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            content: Any = load_file(file)
        else:
            content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types for a file in another format
        raise ValueError(f"weights must be a checkpoint or a state dict, got {file}: {error!r}") from error
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not (isinstance(content, dict) and content and all(isinstance(one, Tensor) for one in content.values())):
        raise ValueError(f"weights must be a checkpoint or a state dict, got {file}, which contains something else")
    network = {name.removeprefix("net."): one for name, one in content.items() if name.startswith("net.")}
    return network or content


def network_of(file: Path) -> str:
    """The network of a checkpoint of `involution fit`, such as rednet50; other files do not name theirs."""
    content: Any = {}
    if file.suffix != ".safetensors":
        content = torch.load(file, map_location="cpu", weights_only=True)
    given = content.get("hyper_parameters", {})
    return str(given.get("backbone", given.get("model_name", "a network that it does not name")))


def load_backbone(body: nn.Module, file: Path, network: str) -> list[str]:
    """Fills a backbone with the weights of a classifier, or of the backbone of a detector or segmenter.

    Args:
        body: made by timm with features_only.
        file: see `read_weights`; a classifier's last layer, and everything outside the backbone, is ignored.
        network: the name of the backbone's network, for errors.

    Returns:
        The names of the ignored tensors.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: its tensors are not exactly the network's, by name and shape.
    """
    weights = read_weights(file)
    prefix = next((one for one in _BODIES if any(name.startswith(one) for name in weights)), "")
    left_out = [name for name in weights if name.startswith(_CLASSIFIER) or not name.startswith(prefix)]
    kept = {name.removeprefix(prefix): one for name, one in weights.items() if name not in left_out}
    _fill(body, kept, lambda: f"backbone_weights must be of the backbone, {network}, got {file} of {network_of(file)}")
    return left_out


def load_network(network: nn.Module, file: Path) -> list[str]:
    """Fills a classifier with another one's weights.

    Args:
        network: a timm model.
        file: see `read_weights`; the last layer is ignored if it is for another number of classes.

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
    complaint = f"checkpoint_path must fit the model, got {file}"
    _fill(network, weights | {name: own[name] for name in left_out}, lambda: complaint)
    return left_out


def _fill(module: nn.Module, weights: dict[str, Tensor], complaint: Callable[[], str]) -> None:
    """Loads weights that must match a module's state dict exactly."""
    wanted = module.state_dict()
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
        raise ValueError(f"{complaint()}: {found}")
    module.load_state_dict(weights)


def _some(names: list[str]) -> str:
    rest = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + rest
