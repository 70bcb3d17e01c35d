"""`involution doctor MODEL`: statistics of a network's involutions on an image, forward and backward, per layer."""

import argparse
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config

from .. import zoo  # noqa: F401  (registers our models with timm)
from ..nn import Diagnosis, diagnose
from ..zoo.checkpoints import checkpoint_or_name
from .checkpoints import load_module
from .images import read_image


def main(arguments: list[str]) -> None:
    """Prints a network's diagnosis.

    Args:
        arguments: after the verb.

    Raises:
        FileNotFoundError: the image or the checkpoint does not exist.
        ValueError: the model is neither a checkpoint nor a name, or the image cannot be read.
        SystemExit: an argument is wrong (the message is on stderr).
    """
    parser = argparse.ArgumentParser(
        prog="involution doctor",
        description="Without arguments: what runs here. With a model: RMS of input, kernels, output and gradients of "
        "every involution, in training and in evaluation, and what is wrong, if anything.",
    )
    parser.add_argument("model", nargs="?", help="a checkpoint of involution fit, or a timm name (untrained)")
    parser.add_argument("--image", type=Path, help="its input, with its mirror image; noise by default")
    given = parser.parse_args(arguments)
    if given.model is None:
        parser.error("--image needs a model")
    with _image(given.image) as file, torch.random.fork_rng():
        torch.manual_seed(0)
        checkpoint = checkpoint_or_name(given.model, pretrained=False)
        found = _of_name(given.model, file) if checkpoint is None else _of_checkpoint(checkpoint, file)
    print(f"{given.model}, {given.image or 'noise'} and its mirror image\n{found}")


def _of_checkpoint(checkpoint: Path, file: Path) -> Diagnosis:
    module = load_module(checkpoint, "model")
    image = module.evaluation(read_image(file))
    return module.diagnose(module.unlabelled([image, image.flip(-1)]))


def _of_name(name: str, file: Path) -> Diagnosis:
    model = timm.create_model(name)
    image = create_transform(**resolve_model_data_config(model))(read_image(file))
    return diagnose(model, torch.stack([image, image.flip(-1)]))


@contextmanager
def _image(file: Path | None) -> Iterator[Path]:
    """The file, or a temporary one of noise."""
    if file is not None:
        yield file
        return
    with tempfile.TemporaryDirectory() as folder:
        pixels = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(Path(folder) / "noise.png")
        yield Path(folder) / "noise.png"
