"""Many calls of mixed shapes: memory, threads and compiled graphs do not grow."""

import os
from pathlib import Path

import pytest
import torch

from involution import involution2d
from involution.nn import Involution2d

SHAPES = [(n, c, h, w) for n in (1, 2) for c in (16, 48) for h, w in ((7, 9), (14, 14), (20, 33), (5, 60))]


def resident() -> int:
    """Resident memory of this process, in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def tasks() -> int:
    """The threads of this process."""
    return len(list(Path("/proc/self/task").iterdir()))


def one(index: int) -> None:
    """A forward and backward call of the operator or of the layer, whose shape the index decides."""
    n, c, h, w = SHAPES[index % len(SHAPES)]
    x = torch.randn(n, c, h, w)
    x = (x.to(memory_format=torch.channels_last) if index % 2 else x).requires_grad_()
    if index % 3:
        k = torch.randn(n, c // 16, 3, 3, h, w, requires_grad=True)
        torch.autograd.grad(involution2d(x, k, padding=1).sum(), (x, k))
    else:
        layer = Involution2d(c, 3, memory_efficient=bool(index % 2))
        layer(x).sum().backward()


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="wants Linux's /proc")
@pytest.mark.parametrize("calls", [600, pytest.param(10_000, marks=pytest.mark.slow)])
def test_memory_and_threads_stay_flat(calls: int) -> None:
    for index in range(200):
        one(index)
    memory, count = resident(), tasks()
    for index in range(calls):
        one(index)
    grown = resident() - memory
    print(f"{calls} calls: {grown / memory:+.3%} of {memory / 2**20:.0f} MiB, {tasks() - count:+d} threads")
    assert grown <= 0.01 * memory
    assert tasks() <= count


def test_a_compiled_layer_is_compiled_for_any_size_once() -> None:
    torch._dynamo.reset()
    graphs = []

    def count(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    compiled = torch.compile(Involution2d(16, 3).eval(), backend=count, dynamic=True)
    with torch.no_grad():
        for size in range(4, 54):
            compiled(torch.randn(1, 16, size, size + 3))
    assert len(graphs) <= 2
