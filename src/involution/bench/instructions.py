"""involution bench instructions: what the compiled GPU kernels execute, counted without a GPU.

Every kernel is compiled ahead of time as a launch would compile it, disassembled and counted. A broken bound, or a
register that spills, makes the command exit with 1. Times are derived, not measured: "issue" is the time in
which a GPU's schedulers hand out so many instructions, one per clock each; "memory" that of the bytes which must move.
"""

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from ..ops.backends import triton as gpu
from ..ops.backends.triton_tiles import Tile, moves
from ..ops.geometry import Geometry
from .ahead_of_time import TARGETS, Program, compile_launch
from .cases import CASES, NECK, Case
from .report import print_tables
from .sass import Counts, count
from .timer import Row

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
MAPS = ("apply", "adjoint", "correlate")
LAYOUTS = ("channels_last", "contiguous")
_SHORT = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}

# Instructions per multiply-add that a kernel may execute at RedNet-50's first layer, on sm_80 and later; its other
# layers, and bfloat16, may take 1.3 times as many.
BOUNDS = {
    ("channels_last", "fp16"): {"apply": 2.7, "adjoint": 3.5, "correlate": 3.3},
    ("channels_last", "fp32"): {"apply": 2.8, "adjoint": 3.6, "correlate": 3.9},
    ("contiguous", "fp16"): {"apply": 5.5, "adjoint": 6.0, "correlate": 5.5},
    ("contiguous", "fp32"): {"apply": 4.2, "adjoint": 5.0, "correlate": 4.2},
}
STRIDED_ADJOINT = {"channels_last": 6.0, "contiguous": 8.0}  # of the layers with stride 2
_SLACK = 1.3


class Chip(NamedTuple):
    """A GPU's datasheet: multiprocessors, clock in Hz, bytes a second, and what one multiprocessor holds at a time."""

    name: str
    processors: int
    clock: float
    bandwidth: float
    warps: int
    programs: int
    shared: int = 100 * 1024

    def issue(self, instructions: float) -> float:
        """Seconds for so many instructions of warps: four schedulers a multiprocessor, one a clock each."""
        return instructions / (self.processors * 4 * self.clock)


CHIPS = {
    "sm_80": Chip("A100", 108, 1.41e9, 2.039e12, 64, 32, 164 * 1024),
    "sm_86": Chip("RTX 3090", 82, 1.695e9, 0.936e12, 48, 16),
    "sm_90": Chip("H100", 132, 1.98e9, 3.35e12, 64, 32, 228 * 1024),
}


def case_geometry(case: Case, batch: int) -> Geometry:
    """A case as the backends take it."""
    stride, padding, dilation = (tuple(axes) for axes in case.window)
    size, kernel = (case.height, case.width), (case.kernel_size,) * 2
    return Geometry(batch, case.channels, case.groups, size, kernel, case.output, stride, padding, dilation)


def counted(
    name: str, case: Case, layout: str, dtype: torch.dtype, target: str, batch: int = 32, baseline: bool = False
) -> Row:
    """The row of one map: its program's resources and, on NVIDIA, instructions, bytes and derived times.

    Args:
        name: apply, adjoint, correlate or fused.
        case: the layer.
        layout: channels_last or contiguous.
        dtype: of the tensors.
        target: of ahead_of_time.TARGETS.
        batch: images.
        baseline: the one-thread-per-output design instead (contiguous).
    """
    geometry = case_geometry(case, batch)
    tensors: list[torch.dtype | None] = [dtype] * 3
    trips = _trips(name, geometry)
    if baseline:
        launch, trips = one_thread(name, geometry), ()
    elif name == "fused":
        launch = gpu.fused_plan(geometry, dtype, case.channels // 4, False, True)
        tensors = [dtype, dtype, dtype, dtype, None, None, dtype]
    else:
        launch = gpu.plan(name, geometry, layout == "channels_last", dtype)[0]
    program = compile_launch(launch, tensors, target)
    what = f"{name}, one thread" if baseline else name
    row: Row = {"what": what, "case": case.name, "batch": batch, "layout": layout, "dtype": _SHORT[dtype]}
    row |= {"target": target, "registers": program.registers, "spilled": program.spilled, "shared": program.shared}
    if target.startswith("sm_"):
        needed = (case.fused_bytes(batch) if name == "fused" else case.bytes(batch)) * dtype.itemsize / 4
        row |= _costs(count(program.assembly, trips), launch, case.flops(batch) / 2, needed, target, program)
    return row


def _costs(
    counts: Counts, launch: gpu.Launch, products: float, needed: float, target: str, program: Program
) -> Row:  # fmt: skip
    """What a launch executes, per multiply-add, and the times that follow on the target's chip."""
    warps = launch.programs * launch.tile.warps
    row: Row = {"per multiply-add": counts.instructions * warps * 32 / products}
    row["kinds"] = {kind: number * warps * 32 / products for kind, number in counts.kinds.most_common()}
    row["asked / needed"] = counts.bytes * warps / needed
    if chip := CHIPS.get(target):
        row["warps"] = resident_warps(chip, launch.tile.warps, program)
        row["issue, us"] = chip.issue(counts.instructions * warps) * 1e6
        row["memory, us"] = needed / chip.bandwidth * 1e6
    return row


def resident_warps(chip: Chip, warps: int, program: Program) -> int:
    """Warps that a multiprocessor holds at a time: its registers, shared memory and slots limit them."""
    registers = 65536 // (-(-program.registers // 8) * 8 * 32 * warps)
    shared = chip.shared // (program.shared + 1024)
    return warps * min(registers, shared, chip.programs, chip.warps // warps)


def _trips(name: str, geometry: Geometry) -> tuple[float, ...]:
    """How often a kernel's loops run: over rows of taps, of which a strided adjoint's classes have K / S on average."""
    kernel, stride = geometry.kernel, geometry.stride
    if name == "fused":
        return float(math.prod(kernel[:-1])), float(kernel[-1])
    rows = math.prod(k / s if name == "adjoint" else k for k, s in zip(kernel[:-1], stride[:-1], strict=True))
    chunks = -(-moves(name, geometry)[0] // 8)
    return (rows * chunks,)


def one_thread(name: str, geometry: Geometry) -> gpu.Launch:
    """The launch of the one-thread-per-output design, for square windows in two dimensions."""
    made = geometry.input if name == "adjoint" else geometry.output
    planes = geometry.groups * math.prod(geometry.kernel) if name == "correlate" else geometry.channels
    elements = geometry.batch * planes * math.prod(made)
    constants = {
        "width": geometry.channels // geometry.groups,
        "KERNEL": geometry.kernel[0],
        "STRIDE": geometry.stride[0],
        "PADDING": geometry.padding[0],
    }
    tile = Tile(256, 1, 1, 1, 8)
    numbers = (elements, geometry.groups, *geometry.input, *geometry.output)
    return gpu.Launch(f"{name}_one_thread", numbers, constants, tile, {"BLOCKS": tile.blocks}, -(-elements // 256))


def bound(row: Row) -> float:
    """The most instructions per multiply-add that a row may have; infinite where there is no bound."""
    if row["what"] not in MAPS or row["target"] == "sm_75":
        return math.inf
    case = CASES.get(row["case"], NECK)
    if row["what"] == "adjoint" and case.stride > 1:
        return STRIDED_ADJOINT[row["layout"]] * (1.0 if case.name == "C128@56/2" else _SLACK)
    first = case.name == "C64@56" and row["dtype"] != "bf16" and row["target"] in ("sm_80", "sm_90")
    dtype = "fp16" if row["dtype"] == "bf16" else row["dtype"]
    return BOUNDS[row["layout"], dtype][row["what"]] * (1.0 if first else _SLACK)


def broken(rows: Sequence[Row]) -> list[str]:
    """The bounds that rows break, in words."""
    found = []
    for row in rows:
        name = " ".join(str(row[key]) for key in ("what", "case", "layout", "dtype", "target"))
        if row["spilled"] and row["what"] in MAPS:
            found.append(f"{name}: {row['spilled']} spilled")
        if round(row.get("per multiply-add", 0.0), 1) > bound(row) + 1e-9:
            found.append(
                f"{name}: {row['per multiply-add']:.2f} instructions per multiply-add, at most {bound(row):.2f}"
            )
    return found


def main(arguments: Sequence[str]) -> int:
    """Runs the command; returns 0, 1 where a bound is broken, or 2 for a wrong call."""
    parser = argparse.ArgumentParser(
        prog="involution bench instructions", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", nargs="+", default=["sm_80", "sm_90"], choices=TARGETS)
    parser.add_argument("--case", nargs="+", default=["C64@56", "C128@56/2"], choices=[*CASES, "all"])
    parser.add_argument("--dtype", nargs="+", default=["float16", "float32"], choices=DTYPES)
    parser.add_argument("--layout", nargs="+", default=LAYOUTS, choices=LAYOUTS)
    parser.add_argument("--kinds", action="store_true", help="instructions by kind too, a line for each program")
    parser.add_argument(
        "--baseline", action="store_true", help="the one-thread-per-output design and the fused layer too"
    )
    try:
        options = parser.parse_args(arguments)
    except SystemExit as stop:
        return int(stop.code or 0)
    rows = []
    for row in _rows(options):
        rows.append(row)
        kinds = row.pop("kinds", {})
        if options.kinds:
            print(
                ", ".join([f"{row['what']} {row['case']} {row['target']}", *(f"{k} {v:.2f}" for k, v in kinds.items())])
            )
    print_tables({"instructions": rows})
    problems = broken(rows)
    for problem in problems:
        print(f"involution bench instructions: {problem}", file=sys.stderr)
    return int(bool(problems))


def _rows(options: Any) -> Iterator[Row]:
    cases = CASES.values() if "all" in options.case else [CASES[name] for name in options.case]
    for case in cases:
        for target in options.target:
            for dtype in (DTYPES[name] for name in options.dtype):
                for layout in options.layout:
                    for name in MAPS:
                        yield counted(name, case, layout, dtype, target)
                if options.baseline:
                    if "contiguous" in options.layout:
                        for name in MAPS:
                            yield counted(name, case, "contiguous", dtype, target, baseline=True)
                    yield counted("fused", case, "channels_last", dtype, target)
