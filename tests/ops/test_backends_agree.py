"""Every backend against the oracle over random geometries: forward and all gradients."""

import pytest
import torch
from harness import BACKENDS, INSTRUCTION_SETS, INTERPRETED, backend, examples
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import loop
from strategies import Call, calls

import involution
from involution.ops.layouts import is_channels_last

OPERATOR = {1: involution.involution1d, 2: involution.involution2d, 3: involution.involution3d}
# Relative to the largest value: rounding of the result, and of sums of a few hundred products. Triton's interpreter may
# round bfloat16 in the wrong direction, by one unit in the last place more.
TOLERANCE = {torch.float64: 1e-14, torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def assert_agrees(name: str, call: Call, seed: int) -> None:
    x, k, g = call.tensors(seed)
    expected = loop(call, x, k, g)
    with backend(name, call.instruction_set if name == "cpu" else None):
        x.requires_grad_()
        k.requires_grad_()
        y = OPERATOR[call.dims](x, k, call.stride, call.padding, call.dilation)
        dx, dk = torch.autograd.grad(y, (x, k), g)
    for what, got, want in zip(("y", "dx", "dk"), (y, dx, dk), expected, strict=True):
        assert got.dtype == call.dtype, what
        error = (got.double() - want).abs().max()
        assert error <= TOLERANCE[call.dtype] * max(1.0, float(want.abs().max())), (what, float(error))
    assert (y.movedim(1, -1) if is_channels_last(x) else y).is_contiguous()


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_random_geometries(dims: int) -> None:
    """500 geometries per dimension, each on every backend."""

    @settings(max_examples=examples(500))
    @given(call=calls(dims), seed=st.integers(0, 2**16))
    def check(call: Call, seed: int) -> None:
        for name in BACKENDS:
            assert_agrees(name, call, seed)

    check()


# Every specialised loop of the kernels: compile-time K and S, all tile sizes, interior and borders.
@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("kernel", [2, 3, 5, 7])
def test_every_loop(kernel: int, stride: int, channels_last: bool, instruction_set: str) -> None:
    for row in (1, 3, 5, 7, 14, 28, 33):
        for width in (16, 5):
            call = Call(
                1, 2, width, (2, row * stride), (2, kernel), (1, stride), (1, kernel // 2), (1, 1),
                torch.float32, channels_last, instruction_set,
            )  # fmt: skip
            assert_agrees("cpu", call, seed=row)


# More taps than the kernels process at a time, or than they support in 16 bits; wide groups, whose sums must not be
# rounded before they are complete.
@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("width", "size", "kernel", "stride"),
    [
        (16, (9, 40), (9, 15), (3, 3)),
        (5, (33,), (13,), (2,)),
        (2, (2, 9, 9), (2, 17, 17), (1, 4, 4)),
        (75, (5, 9), (3, 7), (1, 1)),
    ],
)
def test_large_kernels_and_wide_groups(
    width: int, size: tuple[int, ...], kernel: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype,
    instruction_set: str,
) -> None:  # fmt: skip
    padding = tuple(k // 2 for k in kernel)
    for channels_last in (False, True):
        ones = (1,) * len(size)
        call = Call(1, 2, width, size, kernel, stride, padding, ones, dtype, channels_last, instruction_set)
        assert_agrees("cpu", call, seed=3)


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 3, 4, 8, 16])
def test_every_16_bit_value_is_converted_as_in_torch(width: int, dtype: torch.dtype, instruction_set: str) -> None:
    values = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    other = values[torch.randperm(2**16, generator=torch.Generator().manual_seed(width))]
    x = values[: 2**16 // width * width].view(1, -1, width).transpose(1, 2)  # [1, width, L] in channels_last
    with backend("cpu", instruction_set):
        for factors in (torch.ones_like(other), other):  # exact values, and products that have to be rounded
            k = factors[: x.shape[2]].view(1, 1, 1, -1)
            y = involution.involution1d(x, k)
            torch.testing.assert_close(y, (x.float() * k[:, 0].float()).to(dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_error_is_at_most_twice_that_of_conv2d(
    name: str, channels_last: bool, dtype: torch.dtype
) -> None:
    """A depthwise convolution is an involution with the same kernel at every position."""
    torch.manual_seed(0)
    n, c = (1, 16) if INTERPRETED else (4, 32)
    x, w = torch.randn(n, c, 20, 20).to(dtype), torch.randn(c, 1, 7, 7).to(dtype)
    k = w.view(1, c, 7, 7, 1, 1).expand(n, c, 7, 7, 20, 20)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    exact = torch.nn.functional.conv2d(x.double(), w.double(), padding=3, groups=c)
    theirs = (torch.nn.functional.conv2d(x, w, padding=3, groups=c).double() - exact).abs().max()
    with backend(name):
        ours = (involution.involution2d(x, k, padding=3).double() - exact).abs().max()
    last_place = exact.abs().max() * torch.finfo(dtype).eps
    assert ours <= 2 * theirs + (last_place if INTERPRETED and dtype == torch.bfloat16 else 0)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_taps_outside_are_skipped_and_inside_follow_ieee(name: str, channels_last: bool, bad: float) -> None:
    call = Call(1, 2, 16, (9, 9), (7, 7), (2, 2), (3, 3), (1, 1), torch.float32, channels_last, INSTRUCTION_SETS[0])
    x, k, g = call.tensors(0)
    clean = k.clone()
    outside = torch.zeros_like(k, dtype=torch.bool)
    for u in range(7):
        for v in range(7):
            for i in range(5):
                for j in range(5):
                    outside[:, :, u, v, i, j] = not (0 <= 2 * i + u - 3 < 9 and 0 <= 2 * j + v - 3 < 9)
    assert outside.any()
    k = k.masked_fill(outside, bad)
    with backend(name):
        x.requires_grad_()
        k.requires_grad_()
        y = involution.involution2d(x, k, 2, 3)
        torch.testing.assert_close(y, involution.involution2d(x, clean, 2, 3), rtol=0, atol=0)
        dx, dk = torch.autograd.grad(y, (x, k), g)
        assert dx.isfinite().all()
        assert (dk[outside] == 0).all()
        # Nor does an infinite gradient or input reach the taps outside.
        _, dk = torch.autograd.grad(involution.involution2d(x, k, 2, 3), (x, k), torch.full_like(g, bad))
        assert (dk[outside] == 0).all()
        # Inside, a bad weight spoils its own position and group, and nothing else.
        poisoned = clean.clone()
        poisoned[0, 1, 3, 3, 2, 2] = bad
        y = involution.involution2d(x, poisoned, 2, 3)
        assert not y[0, 16:, 2, 2].isfinite().any()
        assert y[0, :16].isfinite().all()
        assert y.isfinite().sum() == y.numel() - 16
