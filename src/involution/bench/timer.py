"""Interleaved timing: rivals are called round-robin in one process, so that a disturbance affects all of them."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

Row = dict[str, Any]  # one line of a report: "what", "case", "batch" and the measured columns
Rivals = Mapping[str, Callable[[], object]]


def interleaved(
    rivals: Rivals, seconds: float, prepare: Callable[[str], object] = lambda name: None
) -> dict[str, list[float]]:
    """Seconds per call of every rival, measured A B C A B C ... for about `seconds`, after two warm-up calls.

    `prepare` is called with a rival's name before each of its calls, and not timed.
    """
    for _ in range(2):
        for name, run in rivals.items():
            prepare(name)
            run()
    times: dict[str, list[float]] = {name: [] for name in rivals}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(times.values()))) < 5:
        for name, run in rivals.items():
            prepare(name)
            _synchronize()
            start = time.perf_counter()
            run()
            _synchronize()
            times[name].append(time.perf_counter() - start)
    return times


def _synchronize() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def quartiles(times: list[float]) -> list[float]:
    """Lower quartile, median and upper quartile, in milliseconds."""
    return statistics.quantiles([t * 1e3 for t in times], n=4)


def spread(times: list[float]) -> str:
    """Median and quartiles in milliseconds."""
    low, middle, high = quartiles(times)
    return f"{middle:.3g} ({low:.3g}-{high:.3g})"
