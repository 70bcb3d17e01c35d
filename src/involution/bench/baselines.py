"""What others compute involution with: unfold, shifted multiply-adds under torch.compile, a study in C++."""

import ctypes
import os
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from .cases import Case

Operator = Callable[[Tensor, Tensor, int], Tensor]  # input, kernel map, stride; padding is K // 2


def unfold(x: Tensor, k: Tensor, stride: int) -> Tensor:
    """Every window copied out, times its kernel, summed: K*K times the input's memory."""
    n, groups, size, _, height, width = k.shape
    windows = nn.functional.unfold(x, size, padding=size // 2, stride=stride)
    windows = windows.view(n, groups, x.shape[1] // groups, size * size, height, width)
    return (k.reshape(n, groups, 1, size * size, height, width) * windows).sum(3).view(n, -1, height, width)


def unfold3d(x: Tensor, k: Tensor) -> Tensor:
    """The same of a volume, at stride 1."""
    groups, size = k.shape[1:3]
    padded = nn.functional.pad(x, [size // 2] * 6)
    windows = padded.unfold(2, size, 1).unfold(3, size, 1).unfold(4, size, 1)  # [N, C, D, H, W, K, K, K]
    kernels = k.movedim((2, 3, 4), (5, 6, 7)).unsqueeze(2)
    return (windows.unflatten(1, (groups, -1)) * kernels).sum((6, 7, 8)).flatten(1, 2)


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


def depthwise(x: Tensor, k: Tensor, stride: int) -> Tensor:
    """Another operator of the same window: torch's depthwise convolution, one kernel for all positions."""
    size = k.shape[2]
    weight = k[0, 0, :, :, 0, 0].expand(x.shape[1], 1, size, size)
    return nn.functional.conv2d(x, weight, stride=stride, padding=size // 2, groups=x.shape[1])


class Prototype:
    """The CPU study of ../shared/prototype, compiled for this machine: channels_last, float32, group width 16."""

    def __init__(self, source: Path) -> None:
        target = Path(tempfile.gettempdir()) / f"involution-prototype-{os.getuid()}.so"
        if not target.exists() or target.stat().st_mtime < source.stat().st_mtime:
            flags = ["-O3", "-march=native", "-fopenmp", "-shared", "-fPIC", "-std=c++17"]
            subprocess.run(["c++", *flags, "-o", str(target), str(source)], check=True)
        self._library = ctypes.CDLL(str(target))
        for name in ("inv_fwd_nhwc", "inv_gi_nhwc", "inv_gw_nhwc"):
            getattr(self._library, name).argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_int64] * 10
            getattr(self._library, name).restype = None

    def maps(self, case: Case, x: Tensor, k: Tensor, g: Tensor) -> dict[str, Callable[[], Tensor]]:
        """Calls of its three maps on these tensors, each of which makes its result."""
        sizes = (*x.shape, case.groups, case.kernel_size, case.stride, case.kernel_size // 2, *case.output)

        def call(name: str, first: Tensor, second: Tensor, like: Tensor) -> Tensor:
            out = torch.empty_like(like)
            getattr(self._library, name)(first.data_ptr(), second.data_ptr(), out.data_ptr(), *sizes)
            return out

        return {
            "apply": lambda: call("inv_fwd_nhwc", x, k, g),
            "adjoint": lambda: call("inv_gi_nhwc", g, k, x),
            "correlate": lambda: call("inv_gw_nhwc", x, g, k),
        }
