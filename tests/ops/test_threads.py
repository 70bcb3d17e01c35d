"""The kernels with OpenMP threads, Python threads and forked workers."""

import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from involution import involution2d
from involution.ops.fused import fused_layer

SHAPES = [(1, 32, 9, 11), (2, 32, 14, 14), (1, 64, 7, 30), (3, 16, 20, 20)]


def call(index: int, channels_last: bool) -> list[Tensor]:
    """involution2d and the fused layer on the tensors of one seed: outputs and gradients."""
    generator = torch.Generator().manual_seed(index)
    n, c, h, w = SHAPES[index % len(SHAPES)]
    x, hidden, kernel_map, weight, bias = (
        torch.randn(shape, generator=generator)
        for shape in ((n, c, h, w), (n, 8, h, w), (n, c // 16, 5, 5, h, w), (c // 16 * 25, 8), (c // 16 * 25,))
    )
    if channels_last:
        x, hidden = (t.to(memory_format=torch.channels_last) for t in (x, hidden))
    leaves = [t.requires_grad_() for t in (x, hidden, kernel_map, weight, bias)]
    plain = involution2d(x, kernel_map, padding=2)
    fused = fused_layer(x, hidden, weight, bias, [5, 5], [1, 1], [1, 1], relu=True)
    return [plain.detach(), fused.detach(), *torch.autograd.grad(plain.square().sum() + fused.square().sum(), leaves)]


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_one_openmp_runtime() -> None:
    """Two runtimes would have two thread pools, and a fork or an exit could hang in one of them."""
    code = (
        "import torch, involution; involution.involution2d(torch.rand(2, 16, 8, 8), torch.rand(2, 1, 3, 3, 6, 6)); "
        "maps = open('/proc/self/maps').read(); assert 'libinvolution' in maps; "
        "files = {line.split()[-1] for line in maps.splitlines() if '.so' in line}; "
        "print(*(file for file in files if any(name in file for name in ('libgomp', 'libiomp', 'libomp'))), sep='\\n')"
    )
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert len(found) == 1, found


@pytest.mark.parametrize("channels_last", [False, True])
def test_eight_python_threads_at_once(channels_last: bool) -> None:
    """Each calls with its own tensors repeatedly, forward and backward; results equal those of one thread."""
    wanted = [call(index, channels_last) for index in range(8)]
    start = threading.Barrier(8)
    right = [0] * 8

    def repeat(index: int) -> None:
        start.wait()
        for _ in range(12):
            right[index] += same(call(index, channels_last), wanted[index])

    workers = [threading.Thread(target=repeat, args=(index,)) for index in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert right == [12] * 8


class Computed(Dataset):
    """A dataset whose items workers compute with the kernels."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> list[Tensor]:
        return call(index, channels_last=bool(index % 2))


def forked_workers(threads: int) -> None:
    """Forked workers' results equal the parent's, after it has used the kernels with several threads."""
    torch.set_num_threads(threads)
    wanted = [Computed()[index] for index in range(8)]
    loader = DataLoader(Computed(), batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=60)
    assert [same(got, want) for got, want in zip(loader, wanted, strict=True)] == [True] * 8
    assert same(Computed()[0], wanted[0])


@pytest.mark.parametrize("threads", [1, 2])
def test_forked_workers(threads: int) -> None:
    """In a separate process: other tests may have started autograd threads, which forbid it in a forked child."""
    code = f"from test_threads import forked_workers; forked_workers({threads})"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def compute_in_place(x: Tensor, kernel_map: Tensor, y: Tensor) -> None:
    """Fills a shared tensor."""
    y.copy_(involution2d(x, kernel_map, padding=1))


def spawned_process() -> None:
    """A spawned process computes on tensors in shared memory, while this one does too."""
    x, kernel_map = torch.randn(2, 32, 14, 14).share_memory_(), torch.randn(2, 2, 3, 3, 14, 14).share_memory_()
    y = torch.zeros(2, 32, 14, 14).share_memory_()
    child = torch.multiprocessing.get_context("spawn").Process(target=compute_in_place, args=(x, kernel_map, y))
    child.start()
    wanted = involution2d(x, kernel_map, padding=1)
    child.join(120)
    assert child.exitcode == 0
    assert torch.equal(y, wanted)


def test_a_spawned_process_and_shared_tensors() -> None:
    code = "from test_threads import spawned_process\nif __name__ == '__main__': spawned_process()"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
