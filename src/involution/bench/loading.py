"""The throughput of decoding and augmentation beside that of training: does the loader keep up with the network?"""

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image

from .models import training_step
from .registry import subject
from .timer import Row

NETWORKS = ("rednet26", "rednet50", "resnet50")
RECIPES: dict[str, dict[str, Any]] = {
    "crop and flip": {},
    "the modern recipe": {"auto_augment": "rand-m7-mstd0.5-inc1", "random_erasing": 0.25},
}
PHOTOGRAPHS, SIZE, QUALITY = 64, (500, 375), 90


@subject("loading", ("seconds",), extra="tasks")
def loading(seconds: float, batch: int = 16, networks: Sequence[str] = NETWORKS) -> list[Row]:
    """Images per second of the data loader, with 0, 1 and 2 workers, and of networks that train on 224x224.

    The files are synthetic: JPEGs of 500x375, quality 90, of smooth noise, about as large as ImageNet's.
    """
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        _photographs(Path(folder))
        for recipe, options in RECIPES.items():
            for workers in (0, 1, 2):
                speed = _loader_speed(Path(folder), batch, workers, 2 * seconds, options)
                case = f"{recipe}, {workers} workers"
                rows.append({"what": "loader", "case": case, "batch": batch, "images/s": speed})
    images = torch.randn(batch, 3, 224, 224).to(memory_format=torch.channels_last)
    for name in networks:
        step = training_step(timm.create_model(name), images, compiled=False)
        speed = batch / _median_seconds(step, 2 * seconds)
        rows.append({"what": "training", "case": name, "batch": batch, "images/s": speed})
    return rows


def _photographs(folder: Path) -> None:
    random = np.random.default_rng(0)
    for split in ("train", "val"):
        (folder / split / "some").mkdir(parents=True)
    for index in range(PHOTOGRAPHS):
        coarse = random.integers(0, 255, (SIZE[1] // 8, SIZE[0] // 8, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize(SIZE).save(folder / "train" / "some" / f"{index}.jpg", quality=QUALITY)
    Image.fromarray(coarse).save(folder / "val" / "some" / "0.jpg")


def _loader_speed(root: Path, batch: int, workers: int, seconds: float, options: dict[str, Any]) -> float:
    from ..tasks.classify import ImageFolder

    data = ImageFolder(str(root), batch_size=batch, num_workers=workers, **options)
    data.setup("fit")
    loader = data.train_dataloader()
    for _ in loader:  # starts the workers, and fills the page cache
        pass
    count, start = 0, time.perf_counter()
    while count == 0 or time.perf_counter() - start < seconds:
        for images, _ in loader:
            count += len(images)
    return count / (time.perf_counter() - start)


def _median_seconds(step: Any, seconds: float) -> float:
    step()
    times: list[float] = []
    while sum(times) < seconds or len(times) < 3:
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return float(np.median(times))
