"""What is exported: the network of a checkpoint or of a name, with the metadata that its user needs."""

from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from .. import zoo as zoo  # registers our models with timm
from ..zoo.checkpoints import checkpoint_or_name

COARSEST = 32  # stride of the coarsest stage


class Exportable(NamedTuple):
    """A network in evaluation mode and how to call it.

    `multiple`: heights and widths are multiples of it. `static`: takes one image of a fixed size alone.
    """

    network: nn.Module
    size: tuple[int, int]
    outputs: tuple[str, ...]
    metadata: dict[str, Any]
    multiple: int = 1
    static: bool = False


class Logits(nn.Module):
    """A segmenter that returns its logits alone: [N, 3, H, W] -> [N, num_classes, H, W]."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        """The logits of the images' size."""
        logits: Tensor = self.network(images)["out"]
        return logits


def exportable(model: str, pretrained: bool = False) -> Exportable:
    """The network of a checkpoint of `involution fit`, or of a name of timm's.

    Raises:
        FileNotFoundError: model looks like a file, but there is none.
        ValueError: model is neither; a checkpoint is of another module, or carries no preprocessing.
    """
    file = checkpoint_or_name(model, pretrained)
    return _of_name(model, pretrained) if file is None else _of_checkpoint(file)


def _of_name(name: str, pretrained: bool) -> Exportable:
    network = timm.create_model(name, pretrained=pretrained).eval()
    config = resolve_model_data_config(network)
    metadata = {"model": name, "task": "classify", "preprocessing": config}
    return Exportable(network, tuple(config["input_size"][1:]), ("logits",), metadata)


def _of_checkpoint(file: Path) -> Exportable:
    from ..engine.checkpoints import load_module
    from ..tasks.classify import Classifier
    from ..tasks.detect import Detector
    from ..tasks.segment import Segmenter

    module: Any = load_module(file, "model").eval()
    tasks = {Classifier: "classify", Detector: "detect", Segmenter: "segment"}
    task = next((task for kind, task in tasks.items() if isinstance(module, kind)), None)
    if task is None:
        raise ValueError(
            f"model must be a classifier, a detector or a segmenter, got {file}, a {type(module).__name__}"
        )
    given = module.preprocessing
    if given is None:
        raise ValueError(f"model must carry its preprocessing, got {file}, which was trained on data that name none")
    metadata = {
        "model": module.hparams["model_name"],
        "task": task,
        "classes": module.classes,
        "preprocessing": given._asdict(),
    }
    network = module.net.to(memory_format=torch.contiguous_format)
    if task == "classify":
        return Exportable(network, (given.image_size,) * 2, ("logits",), metadata)
    if task == "detect":
        from .detectors import OUTPUTS, detections

        size = (_rounded_up(given.min_size), _rounded_up(given.max_size))
        outputs = OUTPUTS if "mask" in module.kinds else OUTPUTS[:-1]
        return Exportable(detections(network).eval(), size, outputs, metadata, COARSEST, static=True)
    side = max(2, round(given.resize / COARSEST)) * COARSEST
    return Exportable(Logits(network).eval(), (side, side), ("logits",), metadata, COARSEST)


def _rounded_up(length: int) -> int:
    return -(-length // COARSEST) * COARSEST
