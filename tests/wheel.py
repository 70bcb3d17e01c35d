"""Checks an installed wheel where nothing else of this repository is: runs the operator and its gradients.

python tests/wheel.py [BACKEND]        BACKEND that must serve, by default cpu, the compiled kernels
"""

import sys
import time

STARTED = time.perf_counter()

import torch  # noqa: E402
from torch.nn import functional as F  # noqa: E402

import involution  # noqa: E402


def unfolded(x: torch.Tensor, kernels: torch.Tensor) -> torch.Tensor:
    """The definition, by im2col: [N, C, H, W], [N, G, K, K, H, W] -> [N, C, H, W]."""
    n, c, h, w = x.shape
    groups, size = kernels.shape[1:3]
    windows = F.unfold(x, size, padding=size // 2).view(n, groups, c // groups, size * size, h, w)
    return (windows * kernels.flatten(2, 3).unsqueeze(2)).sum(3).view(n, c, h, w)


def main(wanted: str) -> None:
    """Prints what served and the seconds from the start of the program, imports included."""
    torch.manual_seed(0)
    x = torch.rand(2, 32, 9, 11, requires_grad=True)
    kernels = torch.rand(2, 2, 7, 7, 9, 11, requires_grad=True)
    [served] = [backend.name for backend in involution.backends(x, kernels, padding=3) if backend.serves]
    if served != wanted:
        raise SystemExit(f"backend must be {wanted}, got {served}: {involution.backends()}")
    y = involution.involution2d(x, kernels, padding=3)
    expected = unfolded(x, kernels)
    torch.testing.assert_close(y, expected)
    found = torch.autograd.grad(y.square().sum(), (x, kernels))
    for gradient, other in zip(found, torch.autograd.grad(expected.square().sum(), (x, kernels)), strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-3)
    layer = involution.Involution2d(32, 7)
    torch.testing.assert_close(layer(x), x)  # which begins as the identity
    seconds = time.perf_counter() - STARTED
    print(f"involution {involution.__version__} with torch {torch.__version__}: {served} serves; {seconds:.1f} s")


if __name__ == "__main__":
    main(*(sys.argv[1:] or ["cpu"]))
