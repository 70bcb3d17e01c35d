"""Formulations of the layer (span convolution and involution) in onnxruntime: CPU time and memory of each.

    python experiments/onnx_formulations.py            the table of docs/deploy.md

Time is that of the process's own CPU, one thread, medians of interleaved rounds: other jobs of the machine add to the
wall clock, and less to it. Memory is by how much a fresh process's peak grows in two calls.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn
from torch.nn import functional as F

SHAPES = ((64, 56), (128, 28), (256, 14), (512, 7))  # channels and side of RedNet-50's stages
KERNEL, WIDTH, REDUCTION = 7, 16, 4
TAPS = KERNEL**2


def windows(x: Tensor, groups: int) -> Iterator[Tensor]:
    """What every tap sees: [N, G, C/G, H, W]."""
    padded = F.pad(x, (KERNEL // 2,) * 4).unflatten(1, (groups, -1))
    for u in range(KERNEL):
        rows = padded[:, :, :, u : u + x.shape[2]]
        yield from (rows[..., v : v + x.shape[3]] for v in range(KERNEL))


def unfold(x: Tensor, kernels: Tensor) -> Tensor:
    """The windows of the whole image, as published implementations without a kernel have them."""
    n, c, h, w = x.shape
    groups = kernels.shape[1]
    columns = F.unfold(x, KERNEL, padding=KERNEL // 2).view(n, groups, c // groups, TAPS, h, w)
    return (columns * kernels.unsqueeze(2)).sum(3).flatten(1, 2)


def grouped_im2col(x: Tensor, kernels: Tensor) -> Tensor:
    """The windows of one group of channels at a time."""
    width = x.shape[1] // kernels.shape[1]
    return torch.cat([unfold(x[:, g * width :][:, :width], kernels[:, [g]]) for g in range(kernels.shape[1])], 1)


def row_windows(x: Tensor, kernels: Tensor) -> Tensor:
    """The windows of one row of taps at a time, gathered and reduced."""
    seen, total = list(windows(x, kernels.shape[1])), None
    for u in range(0, TAPS, KERNEL):
        part = (torch.stack(seen[u : u + KERNEL], 3) * kernels[:, :, u : u + KERNEL].unsqueeze(2)).sum(3)
        total = part if total is None else total + part
    assert total is not None
    return total.flatten(1, 2)


def shifted_products_first(x: Tensor, kernels: Tensor) -> Tensor:
    """Shifted multiply-adds, written as they come to mind: onnxruntime makes all products before the first sum."""
    total = None
    for window, weight in zip(windows(x, kernels.shape[1]), kernels.split(1, 2), strict=True):
        total = window * weight if total is None else total + window * weight
    assert total is not None
    return total.flatten(1, 2)


def shifted(x: Tensor, kernels: Tensor) -> Tensor:
    """Shifted multiply-adds with every product before the sum of those before it: what export writes."""
    total: Any = None
    last: Any = None
    for window, weight in zip(windows(x, kernels.shape[1]), kernels.split(1, 2), strict=True):
        product = window * weight
        if last is not None:
            total = last if total is None else total + last
        last = product
    return (total + last).flatten(1, 2)


FORMULATIONS = {f.__name__: f for f in (unfold, grouped_im2col, row_windows, shifted_products_first, shifted)}


class Layer(nn.Module):
    """[N, C, H, W] and hidden features [N, C/4, H, W] -> [N, C, H, W]."""

    def __init__(self, channels: int, aggregate: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.aggregate, self.groups = aggregate, channels // WIDTH
        self.span = nn.Conv2d(channels // REDUCTION, self.groups * TAPS, 1)

    def forward(self, x: Tensor, hidden: Tensor) -> Tensor:
        """The aggregate of x with the kernels that the span makes of the hidden features."""
        return self.aggregate(x, self.span(hidden).unflatten(1, (self.groups, TAPS)))


def inputs(channels: int, side: int) -> dict[str, Any]:
    """One image and its hidden features."""
    random = np.random.default_rng(0)
    sizes = {"x": (1, channels, side, side), "hidden": (1, channels // REDUCTION, side, side)}
    return {name: random.standard_normal(size, dtype=np.float32) for name, size in sizes.items()}


def session(file: Path) -> Any:
    """On one thread of the CPU."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def peak() -> float:
    """The process's largest resident memory, in MiB; getrusage's is inherited from the parent's."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def print_memory(file: Path, channels: int, side: int) -> None:
    """By how many MiB the peak of this process grows."""
    run, given = session(file), inputs(channels, side)
    before = peak()
    for _ in range(2):
        run.run(None, given)
    print(peak() - before)


def measure(channels: int, side: int, rounds: int, folder: Path) -> None:
    """Exports, compares and times every formulation at one shape, and prints a line for each."""
    given = inputs(channels, side)
    example = tuple(torch.from_numpy(one) for one in given.values())
    files = {name: folder / f"{name}_{channels}.onnx" for name in FORMULATIONS}
    for name, form in FORMULATIONS.items():
        layer = Layer(channels, form).eval()
        torch.onnx.export(layer, example, files[name], dynamo=True, verbose=False, external_data=False)
    runs = {name: session(file) for name, file in files.items()}
    wanted = runs["unfold"].run(None, given)[0]
    for run in runs.values():
        np.testing.assert_allclose(run.run(None, given)[0], wanted, rtol=1e-4, atol=1e-4)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.process_time()
            run.run(None, given)
            times[name].append(1e3 * (time.process_time() - start))
    for name, file in files.items():
        command = [sys.executable, __file__, "--memory", str(file), str(channels), str(side)]
        memory = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        middle, (low, *_, high) = statistics.median(times[name]), sorted(times[name])
        print(f"C{channels}@{side} {name:24} {middle:7.2f} ms ({low:.2f} to {high:.2f}) {memory:7.1f} MiB", flush=True)


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--memory", nargs=3, help=argparse.SUPPRESS)  # one file, in a fresh process
    options = parser.parse_args()
    if options.memory:
        file, channels, side = options.memory
        print_memory(Path(file), int(channels), int(side))
        return
    with tempfile.TemporaryDirectory() as folder:
        for channels, side in SHAPES:
            measure(channels, side, options.rounds, Path(folder))


if __name__ == "__main__":
    main()
