"""Weights from files into networks, with a word on every key that does not fit."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

_CLASSIFIER = ("fc.", "head.fc.", "classifier.")  # the last layer, which backbones do without


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
    except Exception as error:  # torch's errors for a file that is none of its own are of many kinds
        raise ValueError(f"weights must be a checkpoint or a state dict, got {file}: {error!r}") from error
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not (isinstance(content, dict) and content and all(isinstance(one, Tensor) for one in content.values())):
        raise ValueError(f"weights must be a checkpoint or a state dict, got {file}, which holds something else")
    network = {name.removeprefix("net."): one for name, one in content.items() if name.startswith("net.")}
    return network or content


def load_backbone(body: nn.Module, file: Path) -> list[str]:
    """Fills a backbone with a classifier's weights.

    Args:
        body: made by timm with features_only.
        file: see `read_weights`; the classifier's last layer is left out.

    Returns:
        Names of what was left out.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it lacks tensors, has others or of other shapes.
    """
    weights, wanted = read_weights(file), body.state_dict()
    left_out = [name for name in weights if name.startswith(_CLASSIFIER)]
    weights = {name: one for name, one in weights.items() if name not in left_out}
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
        raise ValueError(f"backbone_weights must fit the backbone, got {file}: {found}")
    body.load_state_dict(weights)
    return left_out


def _some(names: list[str]) -> str:
    rest = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + rest
