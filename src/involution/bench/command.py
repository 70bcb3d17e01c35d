"""involution bench: measures, prints tables, writes JSON and pictures."""

import argparse
import datetime
import platform
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ..ops.backends import cpu
from . import instructions, kernels
from .baselines import Prototype
from .cases import CASES, NECK, Case
from .family import family
from .loading import loading
from .memory import detection, memory
from .models import models, training
from .paper import paper
from .report import print_tables, write
from .roof import measure_roof
from .timer import Row

SUBJECTS = (
    *("layers", "against", "fused", "models", "training", "memory", "threads", "overhead", "paper", "loading"),
    *("detection", "family"),
)


def main(arguments: Sequence[str]) -> int:
    """Runs the command; returns 0, or 2 for a wrong call. `instructions` has options, and a verdict, of its own."""
    if arguments[:1] == ["instructions"]:
        return instructions.main(arguments[1:])
    options = parse(arguments)
    if options is None:
        return 2
    subjects = SUBJECTS if "all" in options.what else list(dict.fromkeys(options.what))
    compiled = options.prototype and "layers" in subjects  # which takes a minute or more
    prototype = Prototype(options.prototype) if compiled else None
    roof = measure_roof()
    machine = describe(roof.flops, roof.bandwidth) | {"command": shlex.join(["involution", "bench", *arguments])}
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    cases = [*CASES.values(), NECK] if options.case == "all" else [(CASES | {NECK.name: NECK})[options.case]]
    results: dict[str, list[Row]] = {}
    for subject in subjects:
        results[subject] = run(subject, cases, options, roof, prototype)
        print_tables({subject: results[subject]})
        for file in write(results, machine, options.out):
            print(f"wrote {file}")
    return 0


def run(subject: str, cases: list[Case], options: Any, roof: Any, prototype: Prototype | None) -> list[Row]:
    """The rows of one subject. The neck is measured at batch 1 only."""
    small = [case for case in cases if case is not NECK]
    usual = [(small, options.batch)] * bool(small) + [([NECK], [1])] * (NECK in cases)
    seconds, device = options.seconds, options.device
    per_case: dict[str, Callable[[list[Case], list[int]], list[Row]]] = {
        "layers": lambda some, batches: kernels.layers(some, batches, seconds, roof, prototype),
        "against": lambda some, batches: kernels.against(some, batches, seconds, device, options.dtype),
        "fused": lambda some, batches: kernels.fused(some, batches, seconds, roof),
        "threads": lambda some, batches: kernels.threads(some, batches, seconds),
        "paper": paper,
    }
    if subject in per_case:
        return [row for some, batches in usual for row in per_case[subject](some, batches)]
    if subject == "models":
        return models(options.batch, 10 * seconds, device=device)
    if subject == "detection":
        return detection()
    if subject == "family":
        return family(small, options.batch, 5 * seconds)
    if subject == "loading":
        return loading(2 * seconds)
    if subject == "training":
        return training([min(16, batch) for batch in options.batch if batch > 1] or [16], 15 * seconds, device=device)
    return memory() if subject == "memory" else kernels.overhead(seconds)


def parse(arguments: Sequence[str]) -> Any:
    """The options, or None after saying what is wrong."""
    parser = argparse.ArgumentParser(prog="involution bench", description=__doc__)
    what = ", ".join(SUBJECTS)
    parser.add_argument(
        "what", nargs="*", default=["against"], help=f"of {what}; all (default: against); or instructions"
    )
    parser.add_argument("--case", default="C64@56", help=f"of {', '.join([*CASES, NECK.name])}; or all")
    parser.add_argument("--batch", type=int, nargs="+", default=[32])
    parser.add_argument("--seconds", type=float, default=2.0, help="for each measurement")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder for bench.json and pictures")
    parser.add_argument("--prototype", type=Path, help="a C++ study to compare with, for layers (inv.cpp)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda; cuda for against, models and training")
    dtypes = {name: getattr(torch, name) for name in ("float32", "float16", "bfloat16")}
    parser.add_argument("--dtype", default="float32", choices=dtypes, help="for against")
    options = parser.parse_args(arguments)
    options.dtype = dtypes[options.dtype]
    problem = ""
    if unknown := [name for name in options.what if name not in (*SUBJECTS, "all")]:
        problem = f"what must be of {what} or all, got {', '.join(unknown)}"
    elif options.case not in (*CASES, NECK.name, "all"):
        problem = f"--case must be of {', '.join([*CASES, NECK.name])} or all, got {options.case}"
    elif min(options.batch) < 1:
        problem = f"--batch must be positive, got {min(options.batch)}"
    elif options.prototype and not options.prototype.exists():
        problem = f"--prototype {options.prototype} does not exist"
    elif options.device not in ("cpu", "cuda") or (options.device == "cuda" and not torch.cuda.is_available()):
        problem = f"--device must be cpu, or cuda where torch finds one, got {options.device}"
    if problem:
        print(f"involution bench: {problem}", file=sys.stderr)
        return None
    return options


def describe(flops: float, bandwidth: float) -> dict[str, Any]:
    """The machine, as the report and the JSON have it."""
    return {
        "cpu": cpu_name(),
        **({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}),
        "threads": torch.get_num_threads(),
        "instruction set": cpu.instruction_set(),
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
        "peak GFLOP/s": round(flops / 1e9, 1),
        "copy GB/s": round(bandwidth / 1e9, 1),
    }


def cpu_name() -> str:
    """The processor's own name for itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
