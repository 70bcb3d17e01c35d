"""Peak resident memory: of one layer, of the operator on a volume, and of a detector's training step.

What is allocated before the call does not count: input, weights and a dense upstream gradient. Every measurement runs
in its own process: python -m involution.bench.memory WHAT CHANNELS HEIGHT WIDTH prints MiB.
"""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from ..nn.involution import Involution2d
from ..ops.functional import involution3d
from .baselines import unfold, unfold3d
from .cases import NECK, Case
from .registry import subject
from .timer import Row

MEMORY_CASES = {
    "inference": "layer, no gradients",
    "inference-unfold": "unfold, no gradients",
    "training": "layer, forward and backward",
    "training-efficient": "layer with memory_efficient=True, forward and backward",
}
VOLUME_CASES = {"volume": "operator in 3d, forward and backward", "volume-unfold": "unfold in 3d, forward and backward"}


@subject("memory")
def memory(case: Case = NECK, volume: int = 48) -> list[Row]:
    """Peak memory of a layer and of the operator on a volume, in MiB, against unfold.

    Each is measured in a process that returns freed memory to the operating system at once.

    Args:
        case: of the layer.
        volume: voxels along each axis, of 16 channels, with a window of 5x5x5.
    """
    mib = 4 * case.channels * case.height * case.width / 2**20
    rows = []
    for what, title in MEMORY_CASES.items():
        row = {"what": title, "case": case.name, "batch": 1}
        row["MiB"] = _in_a_process(what, case.channels, case.height, case.width)
        rows.append(row | {"x, MiB": mib, "y, MiB": mib, "h, MiB": mib / 4})
    mib = 4 * 16 * volume**3 / 2**20
    for what, title in VOLUME_CASES.items():
        row = {"what": title, "case": f"C16@{volume}^3, K5", "batch": 1}
        row["MiB"] = _in_a_process(what, 16, volume, volume)
        rows.append(row | {"x, MiB": mib, "y, MiB": mib})
    return rows


@subject("detection", extra="tasks")
def detection(height: int = 800, width: int = 1333) -> list[Row]:
    """Peak memory of a training step of Faster R-CNN (RedNet-50, involution in neck and head), in MiB."""
    titles = {"detector": "involution", "detector-unfold": "unfold in the place of every involution"}
    return [
        {"what": title, "image": f"3x{height}x{width}", "batch": 1, "MiB": _in_a_process(what, 3, height, width)}
        for what, title in titles.items()
    ]


def _in_a_process(what: str, channels: int, height: int, width: int) -> float:
    command = [sys.executable, "-m", "involution.bench.memory", what, *map(str, (channels, height, width))]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    printed = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
    return float(printed.split()[-1])


def measure(what: str, channels: int, height: int, width: int) -> float:
    """The peak of one layer's call, in MiB above what was resident before it."""
    layer = Involution2d(channels, memory_efficient=what.endswith("efficient"))
    training = what.startswith("training")
    layer.train(training)

    def run(x: Tensor, g: Tensor) -> None:
        with torch.set_grad_enabled(training):
            y = layer(x) if not what.endswith("unfold") else unfold(x, layer.generator(x), 1)
        if training:
            y.backward(g)

    def tensors(*size: int) -> tuple[Tensor, Tensor]:
        x, g = (torch.randn(1, channels, *size).to(memory_format=torch.channels_last) for _ in range(2))
        return x.requires_grad_(training), g

    run(*tensors(max(1, height // 8), max(1, width // 8)))  # allocates what stays: caches, thread pools
    layer.zero_grad()
    x, g = tensors(height, width)
    return _peak(lambda: run(x, g))


def measure_volume(what: str, channels: int, size: int) -> float:
    """The peak of the operator on a volume and of its gradients, in MiB above input, kernel map and output gradient."""

    def run(x: Tensor, k: Tensor, g: Tensor) -> None:
        y = unfold3d(x, k) if what.endswith("unfold") else involution3d(x, k, padding="same")
        torch.autograd.grad(y, (x, k), g)

    def tensors(size: int) -> tuple[Tensor, Tensor, Tensor]:
        x, g = (torch.randn(1, channels, size, size, size) for _ in range(2))
        x = x.to(memory_format=torch.channels_last_3d)
        k = torch.randn(1, size, size, size, 125).permute(0, 4, 1, 2, 3).unflatten(1, (1, 5, 5, 5))
        return x.requires_grad_(), k.requires_grad_(), g.to(memory_format=torch.channels_last_3d)

    run(*tensors(max(1, size // 4)))  # allocates what stays: caches, thread pools
    arguments = tensors(size)
    return _peak(lambda: run(*arguments))


class Unfolded(Involution2d):
    """An involution by unfold, as most ports compute it."""

    def forward(self, input: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C, h, w]."""
        return unfold(input, self.generator(input), self.stride[0])


def unfold_involutions(network: nn.Module) -> None:
    """Makes all of a network's involutions compute by unfold."""
    for module in network.modules():
        if type(module) is Involution2d:
            module.__class__ = Unfolded


def measure_detector(what: str, height: int, width: int) -> float:
    """The peak of a training step on one image, in MiB above what was resident before it."""
    from ..tasks.detect import faster_rcnn  # needs the extra "tasks"

    torch.manual_seed(0)
    model = faster_rcnn("rednet50", "involution", "involution", _skip_resize=True).train()
    model.to(memory_format=torch.channels_last)
    if what.endswith("unfold"):
        unfold_involutions(model)

    def step(height: int, width: int) -> None:
        box = torch.tensor([[0.1, 0.2, 0.6, 0.7]]) * torch.tensor([width, height, width, height])
        targets = [{"boxes": box, "labels": torch.tensor([1])}]
        torch.stack(list(model([torch.rand(3, height, width)], targets).values())).sum().backward()

    step(96, 128)  # allocates what stays: caches, thread pools, gradients
    return _peak(lambda: step(height, width))


def _peak(run: Callable[[], None]) -> float:
    before, peak, done = _resident(), [0.0], threading.Event()

    def watch() -> None:
        while not done.is_set():
            peak[0] = max(peak[0], _resident())
            time.sleep(5e-4)

    watcher = threading.Thread(target=watch)
    watcher.start()
    run()
    done.set()
    watcher.join()
    return max(peak[0], _resident()) - before


def _resident() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE") / 2**20


if __name__ == "__main__":
    what, (channels, height, width) = sys.argv[1], (int(size) for size in sys.argv[2:5])
    if what.startswith("detector"):
        print(measure_detector(what, height, width))
    elif what.startswith("volume"):
        print(measure_volume(what, channels, height))
    else:
        print(measure(what, channels, height, width))
