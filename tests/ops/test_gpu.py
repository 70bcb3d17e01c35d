"""On a GPU: the compiled kernels against the reference, streams, graphs, devices. Run by hand: pytest -m gpu."""

import pytest
import torch
from harness import TILES, backend, use_tiles
from torch import Tensor

from involution import Involution2d, involution1d, involution2d, involution3d
from involution.ops.backends import triton as gpu

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU"),
]
OPERATOR = {1: involution1d, 2: involution2d, 3: involution3d}
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
every_dtype = pytest.mark.parametrize("dtype", TOLERANCE)
both_layouts = pytest.mark.parametrize("channels_last", [True, False], ids=["channels_last", "contiguous"])
CALLS = {  # channels, groups, input, kernel, stride, dilation
    "1d": (32, 2, (101,), (31,), 2, 1),
    "2d": (64, 4, (29, 31), (7, 7), 1, 1),
    "2d, stride": (96, 6, (28, 27), (7, 7), 2, 1),
    "2d, dilation": (21, 7, (17, 19), (5, 3), 1, 2),
    "2d, one group": (70, 1, (9, 8), (3, 3), 1, 1),
    "3d": (16, 1, (5, 9, 10), (3, 3, 3), 1, 1),
}


def tensors(case: str, dtype: torch.dtype, channels_last: bool) -> tuple[Tensor, Tensor, dict[str, object]]:
    channels, groups, input, kernel, stride, dilation = CALLS[case]
    padding = [dilation * (k - 1) // 2 for k in kernel]
    output = [
        (s + 2 * p - dilation * (k - 1) - 1) // stride + 1 for s, p, k in zip(input, padding, kernel, strict=True)
    ]
    torch.manual_seed(0)
    x = torch.randn(2, *input, channels, device="cuda").to(dtype).movedim(-1, 1)
    k = torch.randn(2, *output, groups, *kernel, device="cuda").to(dtype)
    dims = len(input)
    k = k.permute(0, 1 + dims, *range(2 + dims, 2 + 2 * dims), *range(1, 1 + dims))
    if not channels_last:
        x, k = x.contiguous(), k.contiguous()
    return x.requires_grad_(), k.requires_grad_(), {"stride": stride, "padding": padding, "dilation": dilation}


def assert_close(got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    error = (got.double() - want.double()).abs().max()
    assert error <= TOLERANCE[dtype] * max(1.0, float(want.abs().max())), float(error)


@every_dtype
@both_layouts
@pytest.mark.parametrize("case", CALLS)
def test_against_the_reference(case: str, channels_last: bool, dtype: torch.dtype) -> None:
    x, k, window = tensors(case, dtype, channels_last)
    operator = OPERATOR[x.dim() - 2]
    exact = [t.detach().double().requires_grad_() for t in (x, k)]
    with backend("reference"):
        want = operator(*exact, **window)
        g = torch.randn_like(want).to(dtype)
        expected = torch.autograd.grad(want, exact, g.double())
    y = operator(x, k, **window)
    assert_close(y, want, dtype)
    for got, wanted in zip(torch.autograd.grad(y, (x, k), g), expected, strict=True):
        assert_close(got, wanted, dtype)
    runs = [torch.autograd.grad(operator(x, k, **window), (x, k), g) for _ in range(2)]
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


@both_layouts
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_fused_layer(channels_last: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for channels, stride in ((64, 1), (96, 2), (512, 1)):
        layer = Involution2d(channels, 7, stride).eval().to("cuda", dtype)
        x = torch.randn(2, channels, 15, 17, device="cuda").to(dtype)
        x = x.to(memory_format=torch.channels_last) if channels_last else x
        with torch.no_grad():
            assert_close(layer(x), layer.double()(x.double()), dtype)


def test_a_graph_and_another_stream() -> None:
    x, k, window = tensors("2d", torch.float16, True)
    x, k = x.detach(), k.detach()
    want = involution2d(x, k, **window)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = involution2d(x, k, **window)
    x.mul_(2)
    graph.replay()
    torch.testing.assert_close(y, 2 * want, rtol=1e-2, atol=1e-2)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        x.mul_(2)
        y = involution2d(x, k, **window)
    stream.synchronize()
    torch.testing.assert_close(y, 4 * want, rtol=1e-2, atol=1e-2)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_the_tensors_own_device() -> None:
    x, k, window = tensors("2d", torch.float32, True)
    want = involution2d(x, k, **window)
    torch.testing.assert_close(involution2d(x.to("cuda:1"), k.to("cuda:1"), **window).cpu(), want.cpu())


@both_layouts
def test_compiled_and_under_autocast(channels_last: bool) -> None:
    x, k, window = tensors("2d", torch.float32, channels_last)
    want = involution2d(x, k, **window)
    torch.testing.assert_close(torch.compile(involution2d, fullgraph=True)(x, k, **window), want)
    with torch.autocast("cuda", torch.float16):
        y = involution2d(x, k, **window)
    assert y.dtype == torch.float16
    assert_close(y, want, torch.float16)


@both_layouts
@pytest.mark.parametrize("choice", range(3))
def test_every_tile(channels_last: bool, choice: int, monkeypatch: pytest.MonkeyPatch) -> None:
    use_tiles(monkeypatch, lambda *call: [(TILES(*call) * 3)[choice]])
    for case in CALLS:
        x, k, window = tensors(case, torch.float32, channels_last)
        y = OPERATOR[x.dim() - 2](x, k, **window)
        with backend("reference"):
            assert_close(y, OPERATOR[x.dim() - 2](x, k, **window), torch.float32)


def test_autotuned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "_AUTOTUNE", True)
    for case in CALLS:
        x, k, window = tensors(case, torch.float32, True)
        y = OPERATOR[x.dim() - 2](x, k, **window)
        with backend("reference"):
            assert_close(y, OPERATOR[x.dim() - 2](x, k, **window), torch.float32)


def test_numbers_beyond_32_bits() -> None:
    """One image of more than 2^31 numbers."""
    if torch.cuda.get_device_properties(0).total_memory < 20 * 2**30:
        pytest.skip("wants 20 GiB")
    x = torch.ones(1, 16, 2**27 + 64, device="cuda", dtype=torch.float16)
    k = torch.ones(1, 1, 1, x.shape[2], device="cuda", dtype=torch.float16)
    k[..., -1] = 3
    y = involution1d(x, k)
    assert y[0, :, -1].eq(3).all()
    assert y[0, :, :-1].eq(1).all()


def test_it_is_triton_that_runs() -> None:
    x, _, _ = tensors("2d", torch.float32, True)
    assert gpu.why_not(x) == ""
