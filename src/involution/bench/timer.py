"""One timer for everything: rivals take turns in one process, so that a disturbance meets them all."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

Row = dict[str, Any]  # one line of a report: what was timed, and what came out
Rivals = Mapping[str, Callable[[], object]]


def interleaved(
    rivals: Rivals, seconds: float, prepare: Callable[[str], object] = lambda name: None
) -> dict[str, list[float]]:
    """Seconds per call of every rival, measured A B C A B C ... for about `seconds`, after two calls to warm up.

    `prepare` is called with a rival's name before each of its turns, and not timed.
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
            _finish()
            start = time.perf_counter()
            run()
            _finish()
            times[name].append(time.perf_counter() - start)
    return times


def _finish() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def quartiles(times: list[float]) -> list[float]:
    """Lower quartile, median and upper quartile, in milliseconds."""
    return statistics.quantiles([t * 1e3 for t in times], n=4)


def spread(times: list[float]) -> str:
    """Median and quartiles in milliseconds."""
    low, middle, high = quartiles(times)
    return f"{middle:.3g} ({low:.3g}-{high:.3g})"
