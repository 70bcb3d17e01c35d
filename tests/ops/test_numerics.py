"""Denormal, huge, infinite and NaN elements, and results that no number of threads changes, on every backend."""

import pytest
import torch
from harness import BACKENDS, INSTRUCTION_SETS, INTERPRETED, backend, threads
from strategies import Call

from involution import involution2d
from involution.ops.fused import fused_layer

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
LAYOUTS = pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])


def call(dtype: torch.dtype, channels_last: bool, width: int = 16) -> Call:
    size = (3, 4) if INTERPRETED else (6, 13)
    return Call(1, 2, width, size, (3, 3), (1, 2), (1, 1), (1, 1), dtype, channels_last, INSTRUCTION_SETS[0])


def results(made: Call, name: str, x: torch.Tensor, k: torch.Tensor, g: torch.Tensor, isa: str | None = None) -> list:
    """y, dx and dk."""
    with backend(name, isa if name == "cpu" else None):
        x, k = x.detach().requires_grad_(), k.detach().requires_grad_()
        y = involution2d(x, k, made.stride, made.padding, made.dilation)
        return [y.detach(), *torch.autograd.grad(y, (x, k), g)]


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stride", [1, 2])
@LAYOUTS
def test_infinity_and_nan_are_where_the_reference_has_them(
    name: str, stride: int, dtype: torch.dtype, channels_last: bool, request: pytest.FixtureRequest
) -> None:
    if name == "triton" and stride > 1:  # a known limit, in docs/trust.md
        request.applymarker(pytest.mark.xfail(reason="adjoint multiplies gradients by absent taps' zeros", strict=True))
    made = call(dtype, channels_last)
    size = tuple(size * step for size, step in zip((3, 4), (1, stride), strict=True)) if INTERPRETED else made.input
    made = made._replace(stride=(1, stride), input=size)
    tensors = list(made.tensors(0))
    generator = torch.Generator().manual_seed(1)
    for tensor in tensors:
        for value in (torch.inf, -torch.inf, torch.nan):
            tensor.masked_fill_(torch.rand(tensor.shape, generator=generator) < 0.02, value)
    wanted = results(made, "reference", *(t.double() for t in tensors))
    for isa in INSTRUCTION_SETS if name == "cpu" else [None]:
        for got, want in zip(results(made, name, *tensors, isa), wanted, strict=True):
            assert want.isnan().any()
            assert want.isinf().any()
            assert torch.equal(got.isnan(), want.isnan())
            assert torch.equal(got[want.isinf()].double(), want[want.isinf()])
            assert got[want.isfinite()].isfinite().all()


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("factor", ["denormal", "huge"])
@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_denormal_and_huge_elements_are_rounded_once(name: str, dtype: torch.dtype, factor: str) -> None:
    """One product per sum, so that a result is that of float64, rounded once; a wrong scale would lose it."""
    if INTERPRETED and dtype == torch.bfloat16 and factor == "denormal":
        pytest.skip("Triton's interpreter converts denormal bfloat16 wrongly; compiled code does not use it")
    kind = torch.finfo(dtype)
    made = call(dtype, True, width=1)._replace(kernel=(1, 1), padding=(0, 0))
    x, k, g = made.tensors(2)
    x = (x.double() * (kind.tiny / 8 if factor == "denormal" else kind.max / 64)).to(dtype)
    k, g = k.sign() * (1 + k.abs() / 8), g.sign()
    assert (x.double().abs() < kind.tiny).any() or factor == "huge"
    wanted = results(made, "reference", x.double(), k.double(), g.double())
    for got, want in zip(results(made, name, x, k, g), wanted, strict=True):
        ulp = torch.maximum(want.abs() * kind.eps, torch.tensor(kind.tiny * kind.eps, dtype=torch.float64))
        bound = ulp / 2 if dtype != torch.bfloat16 or not INTERPRETED else ulp  # whose interpreter may round otherwise
        assert ((got.double() - want).abs() <= bound).all()


@pytest.mark.skipif(INTERPRETED, reason="the CPU's kernels alone use threads")
@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", DTYPES)
@LAYOUTS
def test_every_number_of_threads_gives_the_same_bits(
    instruction_set: str, dtype: torch.dtype, channels_last: bool
) -> None:
    """The three maps, and the fused layer with its gradients, large enough for several threads."""
    made = call(dtype, channels_last)._replace(batch=2, input=(20, 23), kernel=(5, 7), padding=(2, 3), stride=(1, 1))
    tensors = made.tensors(3)
    generator = torch.Generator().manual_seed(4)
    hidden, weight = (torch.randn(s, generator=generator).to(dtype) for s in ((2, 8, 20, 23), (2 * 35, 8)))
    bias = torch.randn(70, generator=generator).to(dtype)

    def compute(count: int) -> list[torch.Tensor]:
        leaves = [t.detach().requires_grad_() for t in (tensors[0], hidden, weight, bias)]
        with threads(count):
            maps = results(made, "cpu", *tensors, instruction_set)
            with backend("cpu", instruction_set):
                y = fused_layer(*leaves, [5, 7], relu=True)  # type: ignore[misc]
                return [*maps, y.detach(), *torch.autograd.grad(y.square().sum(), leaves)]

    wanted = compute(1)
    for count in (2, 3, 5, 8):
        assert all(torch.equal(a, b) for a, b in zip(compute(count), wanted, strict=True)), count
