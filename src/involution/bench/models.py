"""Whole networks: RedNet against ResNet, inference after `involution.optimize`, and training steps."""

import time
from collections.abc import Sequence
from functools import partial
from statistics import median
from typing import Any

import timm
import torch
import torch._inductor.config
from torch import Tensor, nn

from .. import zoo
from ..rewrite.optimize import optimize
from .registry import subject
from .timer import Row, interleaved, quartiles, spread

PAIR = ("rednet50", "resnet50")
assert zoo  # importing it registers RedNet


@subject("models", ("batches", "seconds", "device"))
def models(
    batches: Sequence[int], seconds: float, names: tuple[str, str] = PAIR, size: int = 224, device: str = "cpu"
) -> list[Row]:
    """Inference of RedNet-50 and ResNet-50 after involution.optimize, and how long that takes with an empty cache."""
    rows = []
    # The first compilation of a process loads the compiler, which neither network's time should include.
    optimize(
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).eval().to(device),
        torch.rand(1, 3, 8, 8).to(device),
    )
    for batch in batches:
        image = torch.randn(batch, 3, size, size, device=device).to(memory_format=torch.channels_last)
        optimized, took = {}, {}
        for name in names:
            torch.compiler.reset()
            model = timm.create_model(name).eval().to(device)
            with torch._inductor.config.patch(force_disable_caches=True):
                start = time.perf_counter()
                optimized[name] = optimize(model, image)
                took[name] = time.perf_counter() - start
        times = interleaved({name: partial(model, image) for name, model in optimized.items()}, 10 * seconds)
        rows.append(_row("inference", f"{names[0]} / {names[1]}", batch, times, names))
        rows[-1] |= {f"optimize {name}, s": took[name] for name in names}
        rows[-1]["optimize ratio"] = took[names[0]] / took[names[1]]
    return rows


@subject("training", ("batches", "seconds", "device"))
def training(
    batches: Sequence[int], seconds: float, names: tuple[str, str] = PAIR, size: int = 224, device: str = "cpu"
) -> list[Row]:
    """A step of SGD with momentum, eager and compiled, at batch sizes from 2 to 16; channels_last."""
    rows = []
    for batch in [min(16, batch) for batch in batches if batch > 1] or [16]:
        image = torch.randn(batch, 3, size, size, device=device).to(memory_format=torch.channels_last)
        for what, compiled in (("training step", False), ("training step, compiled", True)):
            torch.compiler.reset()
            steps = {name: training_step(timm.create_model(name).to(device), image, compiled) for name in names}
            times = interleaved(steps, 15 * seconds)
            rows.append(_row(what, f"{names[0]} / {names[1]}", batch, times, names))
    return rows


def training_step(model: nn.Module, image: Tensor, compiled: bool) -> Any:
    """A function that takes one step of SGD with momentum: forward, cross entropy, backward, update."""
    model = model.train().to(memory_format=torch.channels_last)
    if compiled:
        model.compile()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    target = torch.zeros(len(image), dtype=torch.int64, device=image.device)

    def step() -> None:
        loss = nn.functional.cross_entropy(model(image), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def _row(what: str, case: str, batch: int, times: dict[str, list[float]], names: tuple[str, str]) -> Row:
    row: Row = {"what": what, "case": case, "batch": batch, "ms": spread(times[names[0]])}
    row |= {"quartiles, ms": {name: quartiles(taken) for name, taken in times.items()}}
    return row | {"theirs, ms": spread(times[names[1]]), "ratio": median(times[names[0]]) / median(times[names[1]])}
