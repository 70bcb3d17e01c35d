"""Times the operator's CPU backend against what others use, in turn, and prints ratios of medians.

make bench                                              the shape of RedNet-50's first stage, batch 32
.venv/bin/python -m benchmarks --case all --batch 1     every shape, another batch
"""

import argparse
import platform
import statistics
from collections.abc import Callable
from functools import partial

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import involution
from involution.ops import cpu

from . import baselines
from .cases import CASES, Case
from .timer import in_turn, spread

Operator = baselines.Operator


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.partition("\n")[0])
    parser.add_argument("--case", choices=[*CASES, "all"], default="C64@56")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=20.0, help="for each table row's measurement")
    arguments = parser.parse_args()
    operators: dict[str, Operator] = {"involution": ours, "unfold": baselines.unfold}
    operators["shifted, torch.compile"] = torch.compile(baselines.shifted, dynamic=False)
    if prototype := baselines.prototype():
        operators["prototype"] = prototype
    print(f"{cpu_name()}, {torch.get_num_threads()} threads, {cpu.instruction_set()}, torch {torch.__version__}")
    cases = list(CASES.values()) if arguments.case == "all" else [CASES[arguments.case]]
    for case in cases:
        report(case, arguments.batch, measure(operators, case, arguments.batch, arguments.seconds))


def ours(x: Tensor, k: Tensor, stride: int) -> Tensor:
    return involution.involution2d(x, k, stride, k.shape[2] // 2)


def measure(
    operators: dict[str, Operator], case: Case, batch: int, seconds: float
) -> dict[str, dict[str, list[float]]]:
    """Times per operator, forward without gradients and forward + backward; every result is checked first."""
    x, k, g = case.tensors(batch)
    expected = ours(x, k, case.stride)
    gradients = torch.autograd.grad(expected, (x, k), g)

    def forward(operator: Operator) -> None:
        with torch.no_grad():
            operator(x, k, case.stride)

    def both(operator: Operator) -> None:
        torch.autograd.grad(operator(x, k, case.stride), (x, k), g)

    for operator in operators.values():
        y = operator(x, k, case.stride)
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-3)
        for got, want in zip(torch.autograd.grad(y, (x, k), g), gradients, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-3)
        del y

    def rivals(run: Callable[[Operator], None]) -> dict[str, Callable[[], object]]:
        return {name: partial(run, operator) for name, operator in operators.items()}

    return {"forward": in_turn(rivals(forward), seconds), "forward + backward": in_turn(rivals(both), seconds)}


def report(case: Case, batch: int, results: dict[str, dict[str, list[float]]]) -> None:
    table = Table(
        title=f"{case.name}, K={case.kernel_size}, stride {case.stride}, batch {batch}, float32, channels_last"
    )
    table.add_column("operator")
    for what in results:
        table.add_column(f"{what}, ms (quartiles)", justify="right")
        table.add_column("times ours", justify="right")
    for name in results["forward"]:
        row = [name]
        for times in results.values():
            ratio = statistics.median(times[name]) / statistics.median(times["involution"])
            row += [spread(times[name]), f"{ratio:.2f}"]
        table.add_row(*row)
    Console().print(table)


def cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:  # noqa: PTH123
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
