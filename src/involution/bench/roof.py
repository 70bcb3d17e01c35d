"""The machine's two roofs: operations per second in registers, and bytes per second of a copy."""

import time
from typing import NamedTuple

import torch

from ..ops.backends import cpu


class Roof(NamedTuple):
    """What no kernel can exceed."""

    flops: float  # per second, a multiply-add being two
    bandwidth: float  # bytes per second, read and written

    def seconds(self, flops: float, size: float) -> float:
        """The least time for so many operations on so many bytes."""
        return max(flops / self.flops, size / self.bandwidth)


def measure_roof(numbers: int = 1 << 26, repetitions: int = 7) -> Roof:
    """Measures both with torch's threads: the best of several runs.

    Args:
        numbers: float32 numbers that are copied; far more than caches hold.
        repetitions: runs of the copy.
    """
    source = torch.ones(numbers)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(repetitions):
        start = time.perf_counter()
        target.copy_(source)
        best = min(best, time.perf_counter() - start)
    return Roof(cpu.peak_flops(), 8.0 * numbers / best)
