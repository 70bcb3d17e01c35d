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

from ..allocator import keep_freed_memory, why_not
from ..ops.backends import cpu_library
from . import family, instructions, kernels, loading, memory, models, paper  # noqa: F401  (registers their subjects)
from .cases import CASES, NECK, Case
from .registry import SUBJECTS, Settings, Workload
from .report import print_tables, write
from .roofline import Roofline, measure_roofline
from .timer import Row

_FLAGS = {"workloads": ("--case", "--batch"), "batches": ("--batch",), "seconds": ("--seconds",)}
_FLAGS |= {"device": ("--device",), "dtype": ("--dtype",), "roofline": ()}


def main(arguments: Sequence[str], lacks: Callable[[str, str], bool] = lambda what, extra: False) -> int:
    """Runs the command.

    Args:
        arguments: of the verb.
        lacks: reports which packages of an extra are missing for a verb and subject, and returns whether any are.

    Returns:
        The exit code: 0, 1 where packages are missing (or a bound of `instructions` is broken), 2 for a wrong call.
    """
    if arguments[:1] == ["instructions"]:
        return instructions.main(arguments[1:])
    options = parse(arguments)
    if options is None:
        return 2
    subjects = [SUBJECTS[name] for name in (SUBJECTS if "all" in options.what else dict.fromkeys(options.what))]
    incomplete = [subject.name for subject in subjects if lacks(f"bench {subject.name}", subject.extra)]
    if incomplete:
        return 1
    roofline = measure_roofline()
    machine = describe(roofline) | {"command": shlex.join(["involution", "bench", *arguments])}
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    cases = [*CASES.values(), NECK] if options.case == "all" else [(CASES | {NECK.name: NECK})[options.case]]
    dtype = getattr(torch, options.dtype)
    pairs = workloads(cases, options.batch)
    settings = Settings(pairs, options.batch, options.seconds, options.device, dtype, roofline)
    results: dict[str, list[Row]] = {}
    for subject in subjects:
        results[subject.name] = subject.run(settings)
        print_tables({subject.name: results[subject.name]})
        for file in write(results, machine, options.out):
            print(f"wrote {file}")
    return 0


def workloads(cases: Sequence[Case], batches: Sequence[int]) -> list[Workload]:
    """Every case at every batch size; the neck at batch size 1 only."""
    pairs = [(case, batch) for batch in batches for case in cases if case is not NECK]
    return [*pairs, (NECK, 1)] if NECK in cases else pairs


def parse(arguments: Sequence[str]) -> Any:
    """The options, or None after a message on stderr."""
    parser = argparse.ArgumentParser(
        prog="involution bench",
        description=__doc__,
        epilog=_list_subjects(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "what",
        nargs="*",
        default=["against"],
        help="subjects (see below); all (default: against); or instructions, with options of its own",
    )
    parser.add_argument("--case", default="C64@56", help=f"of {', '.join([*CASES, NECK.name])}; or all")
    parser.add_argument("--batch", type=int, nargs="+", default=[32])
    parser.add_argument("--seconds", type=float, default=2.0, help="for each measurement")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder for bench.json and pictures")
    parser.add_argument("--device", default="cpu", help=f"cpu or cuda, for {_takers('device')}")
    dtypes = ("float32", "float16", "bfloat16")
    parser.add_argument("--dtype", default="float32", choices=dtypes, help=f"for {_takers('dtype')}")
    options = parser.parse_args(arguments)
    problem = ""
    if unknown := [name for name in options.what if name not in (*SUBJECTS, "all")]:
        problem = f"what must be of {', '.join(SUBJECTS)} or all, got {', '.join(unknown)}"
    elif options.case not in (*CASES, NECK.name, "all"):
        problem = f"--case must be of {', '.join([*CASES, NECK.name])} or all, got {options.case}"
    elif min(options.batch) < 1:
        problem = f"--batch must be positive, got {min(options.batch)}"
    elif options.device not in ("cpu", "cuda") or (options.device == "cuda" and not torch.cuda.is_available()):
        problem = f"--device must be cpu, or cuda where torch finds one, got {options.device}"
    if problem:
        print(f"involution bench: {problem}", file=sys.stderr)
        return None
    return options


def _list_subjects() -> str:
    """Every subject with its summary, its options and its extra."""
    lines = ["subjects:"]
    for subject in SUBJECTS.values():
        flags = dict.fromkeys(flag for option in subject.options for flag in _FLAGS[option])
        needs = () if subject.extra == "bench" else (f"needs involution[{subject.extra}]",)
        notes = "; ".join(part for part in (" ".join(flags), *needs) if part)
        lines.append(f"  {subject.name:10} {subject.summary}" + (f" [{notes}]" if notes else ""))
    return "\n".join(lines)


def _takers(option: str) -> str:
    return ", ".join(subject.name for subject in SUBJECTS.values() if option in subject.options)


def describe(roofline: Roofline) -> dict[str, Any]:
    """The machine, as the report and the JSON have it."""
    return {
        "cpu": cpu_name(),
        **({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}),
        "threads": torch.get_num_threads(),
        "instruction set": cpu_library.instruction_set(),
        "torch": torch.__version__,
        "freed memory": "kept" if keep_freed_memory() else f"malloc unchanged ({why_not()})",
        "date": datetime.date.today().isoformat(),
        "peak GFLOP/s": round(roofline.flops / 1e9, 1),
        "copy GB/s": round(roofline.bandwidth / 1e9, 1),
    }


def cpu_name() -> str:
    """The processor's model name, as the operating system reports it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
