"""The roofline model of this machine: peak arithmetic in registers, and the bandwidth of a large copy."""

import time
from typing import NamedTuple

import torch

from ..ops.backends import cpu_library


class Roofline(NamedTuple):
    """The two bounds that no kernel exceeds."""

    flops: float  # per second, a multiply-add being two
    bandwidth: float  # bytes per second, read and written

    def min_seconds(self, flops: float, size: float) -> float:
        """The lower bound on the time of so many operations on so many bytes."""
        return max(flops / self.flops, size / self.bandwidth)


_ELEMENTS = 1 << 26  # float32 elements that are copied: far more than caches hold
_REPETITIONS = 7


def measure_roofline() -> Roofline:
    """Measures both with torch's threads: the best of several runs."""
    source = torch.ones(_ELEMENTS)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(_REPETITIONS):
        start = time.perf_counter()
        target.copy_(source)
        best = min(best, time.perf_counter() - start)
    return Roofline(cpu_library.peak_flops(), 8.0 * _ELEMENTS / best)
