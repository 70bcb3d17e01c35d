"""One timer for everything: rivals take turns in one process, so that a disturbance meets them all."""

import statistics
import time
from collections.abc import Callable, Mapping

import torch

Rivals = Mapping[str, Callable[[], object]]


def in_turn(rivals: Rivals, seconds: float) -> dict[str, list[float]]:
    """Seconds per call of every rival, measured A B C A B C ... for about `seconds`, after two calls to warm up."""
    for _ in range(2):
        for run in rivals.values():
            run()
    times: dict[str, list[float]] = {name: [] for name in rivals}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(times.values()))) < 5:
        for name, run in rivals.items():
            _finish()
            start = time.perf_counter()
            run()
            _finish()
            times[name].append(time.perf_counter() - start)
    return times


def _finish() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def median(times: list[float]) -> float:
    """The median, in seconds."""
    return statistics.median(times)


def spread(times: list[float]) -> str:
    """Median and quartiles in milliseconds."""
    low, middle, high = statistics.quantiles([t * 1e3 for t in times], n=4)
    return f"{middle:.3g} ({low:.3g}-{high:.3g})"
