"""What others compute involution with: unfold, shifted multiply-adds under torch.compile, and the prototype study."""

import ctypes
import os
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

Operator = Callable[[Tensor, Tensor, int], Tensor]  # input, kernel map, stride; padding is K // 2


def unfold(x: Tensor, k: Tensor, stride: int) -> Tensor:
    """Every window copied out, times its kernel, summed: K*K times the input's memory."""
    n, groups, size, _, height, width = k.shape
    windows = nn.functional.unfold(x, size, padding=size // 2, stride=stride)
    windows = windows.view(n, groups, x.shape[1] // groups, size * size, height, width)
    return (k.reshape(n, groups, 1, size * size, height, width) * windows).sum(3).view(n, -1, height, width)


def shifted(x: Tensor, k: Tensor, stride: int) -> Tensor:
    """One multiply-add of the shifted, zero-padded input per tap; made for torch.compile, which fuses all of them."""
    groups, size, _, height, width = k.shape[1:]
    padded = nn.functional.pad(x, [size // 2] * 4).unflatten(1, (groups, -1))
    rows, columns = (height - 1) * stride + 1, (width - 1) * stride + 1
    y: Tensor | None = None
    for u in range(size):
        for v in range(size):
            term = padded[..., u : u + rows : stride, v : v + columns : stride] * k[:, :, u, v].unsqueeze(2)
            y = term if y is None else y + term
    assert y is not None
    return y.flatten(1, 2)


def prototype() -> Operator | None:
    """The CPU study in ../shared/prototype, compiled for this machine, or None where it is not at hand.

    Forward only in autograd's eyes; channels_last, float32, group width 16, K in 3, 5, 7 and stride 1 or 2.
    """
    source = Path(__file__).parents[2] / "shared" / "prototype" / "inv.cpp"
    if not source.exists():
        return None
    target = Path(tempfile.gettempdir()) / f"involution-prototype-{os.getuid()}.so"
    if not target.exists() or target.stat().st_mtime < source.stat().st_mtime:
        flags = ["-O3", "-march=native", "-fopenmp", "-shared", "-fPIC", "-std=c++17"]
        subprocess.run(["c++", *flags, "-o", target, source], check=True)
    library = ctypes.CDLL(str(target))
    for name in ("inv_fwd_nhwc", "inv_gi_nhwc", "inv_gw_nhwc"):
        getattr(library, name).argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_int64] * 10
        getattr(library, name).restype = None

    class Prototype(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, k, stride):
            ctx.save_for_backward(x, k)
            ctx.stride = stride
            y = torch.empty(x.shape[0], x.shape[1], *k.shape[-2:], memory_format=torch.channels_last)
            library.inv_fwd_nhwc(x.data_ptr(), k.data_ptr(), y.data_ptr(), *sizes(x, k, stride))
            return y

        @staticmethod
        def backward(ctx, g):
            x, k = ctx.saved_tensors
            dx, dk = torch.empty_like(x), torch.empty_like(k)
            library.inv_gi_nhwc(g.data_ptr(), k.data_ptr(), dx.data_ptr(), *sizes(x, k, ctx.stride))
            library.inv_gw_nhwc(x.data_ptr(), g.data_ptr(), dk.data_ptr(), *sizes(x, k, ctx.stride))
            return dx, dk, None

    def sizes(x: Tensor, k: Tensor, stride: int) -> tuple[int, ...]:
        return (*x.shape, k.shape[1], k.shape[2], stride, k.shape[2] // 2, *k.shape[-2:])

    return Prototype.apply
