"""What the property tests do not reach of the GPU backend, interpreted: TRITON_INTERPRET=1 pytest."""

from typing import Any

import pytest
import torch
from harness import INTERPRETED, TILES, backend, use_tiles

from involution import involution2d
from involution.nn import LocalSelfAttention1d, LocalSelfAttention2d, LocalSelfAttention3d
from involution.ops.backends import triton as gpu
from involution.ops.fused import fused_layer

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="wants TRITON_INTERPRET=1")
both_layouts = pytest.mark.parametrize("channels_last", [True, False], ids=["channels_last", "contiguous"])


def results(channels_last: bool, name: str = "triton") -> list[torch.Tensor]:
    """y, dx and dk of a call with three groups of five channels, none of which fills its tile."""
    torch.manual_seed(0)
    x, k, g = torch.randn(2, 15, 6, 7), torch.randn(2, 3, 3, 9, 3, 7), torch.randn(2, 15, 3, 7)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    x.requires_grad_()
    k.requires_grad_()
    with backend(name):
        y = involution2d(x, k, (2, 1), (1, 4))
        return [y.detach(), *torch.autograd.grad(y, (x, k), g)]


@both_layouts
def test_distances_beyond_32_bits(channels_last: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    use_tiles(monkeypatch, TILES)
    want = results(channels_last)
    monkeypatch.setattr(gpu, "_is_wide", lambda geometry: True)
    gpu.plan.cache_clear()
    for got, wanted in zip(results(channels_last), want, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=0)


@both_layouts
def test_windows_that_reach_beyond_32_bits(channels_last: bool) -> None:
    far = 2**30
    x, k = torch.randn(1, 2, 3, 5), torch.randn(1, 1, 1, 2, 3, 3)
    x = x.to(memory_format=torch.channels_last) if channels_last else x
    x.requires_grad_()
    k.requires_grad_()
    found = []
    for name in ("triton", "reference"):
        with backend(name):
            y = involution2d(x, k, (1, far), (0, far), (1, 2))
            found.append([y, *torch.autograd.grad(y.square().sum(), (x, k))])
    assert found[1][0].count_nonzero() == 6  # the middle column alone meets the image
    for got, wanted in zip(*found, strict=True):
        torch.testing.assert_close(got, wanted)


@both_layouts
@pytest.mark.parametrize("choice", range(3))
def test_every_tile(channels_last: bool, choice: int, monkeypatch: pytest.MonkeyPatch) -> None:
    use_tiles(monkeypatch, lambda *call: [(TILES(*call) * 3)[choice]])
    for got, wanted in zip(results(channels_last), results(channels_last, "reference"), strict=True):
        torch.testing.assert_close(got, wanted)


@both_layouts
@pytest.mark.parametrize("layer", [LocalSelfAttention1d, LocalSelfAttention2d, LocalSelfAttention3d])
def test_local_self_attention(layer: Any, channels_last: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its output and all gradients: the three maps in a row."""
    use_tiles(monkeypatch, TILES)
    torch.manual_seed(0)
    attention = layer(12, 3, stride=2, heads=2, relative_position="factorised", dtype=torch.float64)
    x = torch.randn(1, 12, *(5, 4, 3)[: layer.dims], dtype=torch.float64)
    if channels_last:
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    x.requires_grad_()
    found = []
    for name in ("triton", "reference"):
        with backend(name):
            y = attention(x)
            found.append([y, *torch.autograd.grad(y.square().sum(), [x, *attention.parameters()])])
    for got, wanted in zip(*found, strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("hidden", [3, 600])
def test_few_and_many_hidden_features(hidden: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond 256, and in float64, the map is stored."""
    launched: list[str] = []
    use_tiles(monkeypatch, TILES)
    kernel = gpu._kernel
    monkeypatch.setattr(gpu, "_kernel", lambda name: launched.append(name) or kernel(name))
    torch.manual_seed(0)
    x, h = torch.randn(1, 6, 4, 4, dtype=dtype), torch.randn(1, hidden, 4, 4, dtype=dtype)
    weight, bias = torch.randn(18, hidden, dtype=dtype), torch.randn(18, dtype=dtype)
    with backend("triton"):
        y = fused_layer(x, h, weight, bias, 3)
    assert launched == ["fused_kernel" if hidden == 3 and dtype == torch.float32 else "apply_channels_last"]
    with backend("reference"):
        torch.testing.assert_close(y, fused_layer(x, h, weight, bias, 3), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("set_newer", [True, False])
def test_torchs_switches_of_precision(set_newer: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asking must not fail whichever of torch's two switches a user has set."""
    before = torch.backends.cuda.matmul.fp32_precision
    if set_newer:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
    else:
        torch.set_float32_matmul_precision("high")
    try:
        assert gpu._tf32()
    finally:
        if set_newer:
            torch.backends.cuda.matmul.fp32_precision = before
        else:
            torch.set_float32_matmul_precision("highest")
    assert not gpu._tf32()
