"""A model of a GPU's time: the memory traffic and arithmetic that a layer needs.

Calculated from datasheets; nothing here is measured. What the kernels execute is counted in instructions.py.
"""

from collections.abc import Sequence
from typing import NamedTuple

from .registry import Workload, subject
from .timer import Row


class Chip(NamedTuple):
    """Datasheet rates: bytes per second of memory, operations per second in float32 and on tensor cores in 16 bits."""

    name: str
    bandwidth: float
    float32: float
    matrices: float


CHIPS = (Chip("A100", 2.039e12, 19.5e12, 312e12), Chip("H100", 3.35e12, 66.9e12, 989e12))


@subject("paper", ("workloads",))
def paper(workloads: Sequence[Workload]) -> list[Row]:
    """Calculated for GPUs, float16: bytes, operations, microseconds (the longer of memory's and arithmetic's)."""
    rows = []
    for case, batch in workloads:
        for what in ("apply", "adjoint", "correlate", "fused"):
            fused = what == "fused"
            size = (case.fused_bytes(batch) if fused else case.bytes(batch)) / 2
            row: Row = {"what": what, "case": case.name, "batch": batch, "MB": size / 1e6}
            row["GFLOP"] = (case.fused_flops(batch) if fused else case.flops(batch)) / 1e9
            for chip in CHIPS:
                arithmetic = case.flops(batch) / chip.float32
                if fused:
                    arithmetic += (case.fused_flops(batch) - case.flops(batch)) / chip.matrices
                row[f"{chip.name}, us"] = max(size / chip.bandwidth, arithmetic) * 1e6
            rows.append(row)
    return rows
