"""Shared by the examples: reads a photo, writes results side by side, and prints the time of a call."""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_image
from torch import Tensor

FOLDER = Path("runs/examples")


def load(name: str) -> Tensor:
    """A photo as [1, 3, H, W] float32 in 0..1, channels-last: a file, or one of scikit-learn's two by name."""
    pixels = np.asarray(Image.open(name).convert("RGB")) if Path(name).is_file() else load_sample_image(name)
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 255


def options(description: str | None, arguments: list[str], photo: str | None = None) -> argparse.Namespace:
    """The command line of an example; `photo` is the default, None for an example without photos."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    if photo is not None:
        parser.add_argument("photo", nargs="?", default=photo, help=f"a file (default: scikit-learn's {photo})")
    given = parser.parse_args(arguments)
    if photo is not None and given.photo != photo and not Path(given.photo).is_file():
        parser.error(f"photo must be a file, got {given.photo}, which does not exist")
    return given


def before_and_after(name: str, *images: Tensor) -> None:
    """Writes images of equal height side by side."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    row = torch.cat([image[0].clamp(0, 1) for image in images], dim=2)
    file = FOLDER / f"{name}.png"
    Image.fromarray((255 * row).round().byte().permute(1, 2, 0).numpy()).save(file)
    print(f"wrote {file}")


@torch.inference_mode()
def say_time(call: Callable[[], object]) -> None:
    """Prints the median of seven calls, after a warm-up call."""
    taken = []
    for _ in range(8):
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    print(f"takes {1e3 * statistics.median(taken[1:]):.0f} ms on {torch.get_num_threads()} threads")
