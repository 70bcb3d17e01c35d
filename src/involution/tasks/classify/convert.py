"""What a `Classifier` needs to take a classifier's weights that `involution fit` has not made."""

from pathlib import Path
from typing import Any

from timm.models import get_pretrained_cfg
from torch import Tensor

from ...zoo.identify import identify
from .module import Classifier
from .preprocessing import Preprocessing

MODULE = Classifier  # the class whose arguments `converted` returns


def converted(weights: dict[str, Tensor], file: Path) -> tuple[dict[str, Any], dict[str, Tensor], Preprocessing]:
    """Arguments of `Classifier`, its network's tensors, and the preprocessing that the network was trained with.

    Args:
        weights: of a RedNet, by our names.
        file: their name in errors.

    Raises:
        ValueError: they are of no RedNet, or have no classifier.
    """
    found = identify(weights, str(file))
    cfg = get_pretrained_cfg(found.name)
    kwargs = dict(found.arguments)
    num_classes = kwargs.pop("num_classes", cfg.num_classes)
    if num_classes == 0:
        raise ValueError(f"weights must be of a classifier, got {file}, of a backbone; .safetensors takes those")
    size = cfg.input_size[-1]
    preprocessing = Preprocessing(size, round(size / cfg.crop_pct), tuple(cfg.mean), tuple(cfg.std))
    return {"model_name": found.name, "num_classes": num_classes, "model_kwargs": kwargs}, weights, preprocessing
