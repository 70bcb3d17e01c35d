"""The public functions: shapes, memory formats, dtypes, and errors."""

import numpy as np
import pytest
import torch
from harness import BACKENDS, backend

import involution
from involution import involution1d, involution2d, involution3d
from involution.ops.layouts import is_channels_last


def pair(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """x [2, 4, 5, 6] and k [2, 2, 3, 3, 5, 6], for padding 1."""
    torch.manual_seed(0)
    return torch.randn(2, 4, 5, 6, dtype=dtype), torch.randn(2, 2, 3, 3, 5, 6, dtype=dtype)


def test_a_constant_kernel_map_is_a_convolution() -> None:
    x, w = torch.randn(2, 6, 9, 8), torch.randn(6, 1, 3, 4)
    expected = torch.nn.functional.conv2d(x, w, stride=(2, 1), padding=(1, 2), dilation=(1, 2), groups=6)
    k = w.view(1, 6, 3, 4, 1, 1).expand(2, 6, 3, 4, *expected.shape[2:])
    torch.testing.assert_close(involution2d(x, k, (2, 1), (1, 2), (1, 2)), expected)


@pytest.mark.parametrize("kernel", [2, 3, 4, 5])
@pytest.mark.parametrize("dilation", [1, 3])
def test_same_and_valid_padding_are_those_of_conv(kernel: int, dilation: int) -> None:
    x, w = torch.randn(1, 2, 15), torch.randn(2, 1, kernel)
    for padding in ("same", "valid"):
        expected = torch.nn.functional.conv1d(x, w, padding=padding, dilation=dilation, groups=2)
        k = w.view(1, 2, kernel, 1).expand(1, 2, kernel, expected.shape[-1])
        torch.testing.assert_close(involution1d(x, k, padding=padding, dilation=dilation), expected)


@pytest.mark.parametrize(("operator", "dims"), [(involution1d, 1), (involution2d, 2), (involution3d, 3)])
def test_unbatched_is_a_batch_of_one(operator, dims: int) -> None:
    x, k = torch.randn(4, *[5] * dims), torch.randn(2, *[3] * dims, *[5] * dims)
    torch.testing.assert_close(operator(x, k, padding=1), operator(x[None], k[None], padding=1)[0])


@pytest.mark.parametrize("name", BACKENDS)
def test_expanded_strided_and_overlapping_inputs(name: str) -> None:
    x, k = pair()
    variants = [
        (x[:1].expand(2, 4, 5, 6), k),
        (torch.randn(2, 8, 10, 12)[:, ::2, ::2, ::2], k),
        (x.flip(3).transpose(2, 3).contiguous().transpose(2, 3), k),
        (torch.randn(40).as_strided((2, 4, 5, 6), (3, 2, 5, 1)), k),
        (x, k[:1, :, :1].expand(2, 2, 3, 3, 5, 6)),
        (x.to(memory_format=torch.channels_last), k.flip(0)),
    ]
    with backend(name):
        for a, b in variants:
            expected = involution2d(a.contiguous(), b.contiguous(), padding=1)
            torch.testing.assert_close(involution2d(a, b, padding=1), expected)
            a, b = a.detach().requires_grad_(), b.detach().requires_grad_()
            got = torch.autograd.grad(involution2d(a, b, padding=1).square().sum(), (a, b))
            a2, b2 = a.detach().clone().contiguous().requires_grad_(), b.detach().clone().contiguous().requires_grad_()
            want = torch.autograd.grad(involution2d(a2, b2, padding=1).square().sum(), (a2, b2))
            for g, w in zip(got, want, strict=True):
                torch.testing.assert_close(g, w)


@pytest.mark.parametrize("name", BACKENDS)
def test_output_is_channels_last_exactly_if_the_input_is(name: str) -> None:
    with backend(name):
        for dims, operator in ((1, involution1d), (2, involution2d), (3, involution3d)):
            x, k = torch.randn(2, 4, *[5] * dims), torch.randn(2, 2, *[3] * dims, *[5] * dims)
            assert operator(x, k, padding=1).is_contiguous()
            y = operator(x.movedim(1, -1).contiguous().movedim(-1, 1), k, padding=1)
            assert is_channels_last(y)
        both = torch.randn(2, 1, 5, 5).to(memory_format=torch.channels_last)
        assert involution2d(both, torch.randn(2, 1, 3, 3, 5, 5), padding=1).is_contiguous()


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("channels_last", [True, False])
def test_only_one_argument_may_require_a_gradient(name: str, channels_last: bool) -> None:
    x, k = pair()
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    with backend(name):
        both = torch.autograd.grad(
            involution2d(x.requires_grad_(), k.requires_grad_(), padding=1).square().sum(), (x, k)
        )
        (dx,) = torch.autograd.grad(involution2d(x, k.detach(), padding=1).square().sum(), x)
        (dk,) = torch.autograd.grad(involution2d(x.detach(), k, padding=1).square().sum(), k)
    assert torch.equal(dx, both[0])
    assert torch.equal(dk, both[1])


@pytest.mark.parametrize("name", BACKENDS)
def test_an_empty_batch_has_an_empty_output_and_gradients(name: str) -> None:
    x = torch.randn(0, 4, 5, 6, requires_grad=True)
    k = torch.randn(0, 2, 3, 3, 5, 6, requires_grad=True)
    with backend(name):
        y = involution2d(x, k, padding=1)
        y.sum().backward()
    assert y.shape == (0, 4, 5, 6)
    assert x.grad.shape == x.shape
    assert k.grad.shape == k.shape


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("channels_last", [False, True])
def test_more_than_2_to_the_31_elements(name: str, channels_last: bool) -> None:
    """Lazily allocated zero pages, of which only three positions are touched."""
    size = 2**30 + 100
    shape = (1, size, 2) if channels_last else (1, 2, size)
    x = torch.from_numpy(np.zeros(shape, dtype=np.float32))
    if channels_last:
        x = x.movedim(-1, 1)
    x[0, 1, [0, 2**29, 2**30]] = torch.tensor([1.0, 2.0, 3.0])
    k = torch.tensor([10.0, 20.0, 30.0]).view(1, 1, 1, 3)
    assert x.numel() > 2**31
    with backend(name):
        y = involution1d(x, k, stride=2**29)
    assert y[0].tolist() == [[0, 0, 0], [10, 40, 90]]


@pytest.mark.parametrize("device_type", ["cpu"])
def test_autocast_casts_both_but_not_float64(device_type: str) -> None:
    x, k = pair()
    with torch.autocast(device_type, torch.bfloat16):
        assert involution2d(x, k, padding=1).dtype == torch.bfloat16
        assert involution2d(x.bfloat16(), k, padding=1).dtype == torch.bfloat16
        assert involution2d(x.double(), k.double(), padding=1).dtype == torch.float64
        with pytest.raises(TypeError, match="one dtype"):
            involution2d(x.double(), k, padding=1)
    x.requires_grad_()
    with torch.autocast(device_type, torch.bfloat16):
        y = involution2d(x, k, padding=1)
    y.float().sum().backward()
    assert x.grad.dtype == torch.float32


x0, k0 = pair()
BAD = [
    ((x0[0], k0), {}, ValueError, r"rank 4.*\[4, 5, 6\]"),
    ((x0, k0[0]), {}, ValueError, r"rank 6.*\[2, 3, 3, 5, 6\]"),
    ((x0.numpy(), k0), {}, TypeError, "input must be a torch.Tensor, got ndarray"),
    ((x0, None), {}, TypeError, "kernel_map must be a torch.Tensor, got NoneType"),
    ((x0.int(), k0), {}, TypeError, "input must be float16.*torch.int32"),
    ((x0, k0.to(torch.complex64)), {}, TypeError, "kernel_map must be float16.*complex64"),
    ((x0, k0.double()), {}, TypeError, "one dtype.*float32.*float64"),
    ((x0, k0.to("meta")), {}, ValueError, "one device.*cpu.*meta"),
    ((x0[:1], k0), {}, ValueError, "one batch size, got 1 and 2"),
    ((x0[:, :3], k0), {}, ValueError, "2 groups for 3 channels"),
    ((x0[:, :0], k0), {}, ValueError, "groups"),
    ((x0, k0[:, :0]), {}, ValueError, "groups"),
    ((x0[..., :0], k0), {}, ValueError, "empty spatial axis"),
    ((x0, k0[:, :, :0]), {}, ValueError, "no empty kernel"),
    ((x0, k0[..., :0]), {}, ValueError, "no empty kernel or spatial"),
    ((x0, k0[..., :5]), {"padding": 1}, ValueError, r"\[5, 6\], got \[5, 5\]"),
    ((x0, k0), {}, ValueError, r"spatial sizes \[3, 4\], got \[5, 6\]"),
    ((x0, k0), {"padding": 1, "stride": 0}, ValueError, "stride must be at least 1, got 0"),
    ((x0, k0), {"padding": 1, "stride": -1}, ValueError, "stride must be at least 1, got -1"),
    ((x0, k0), {"padding": 1, "dilation": 0}, ValueError, "dilation must be at least 1, got 0"),
    ((x0, k0), {"padding": -1}, ValueError, "padding must be at least 0, got -1"),
    ((x0, k0), {"padding": (1, 1, 1)}, ValueError, "padding must be an int or 2 ints"),
    ((x0, k0), {"padding": 1.0}, ValueError, "padding must be an int or 2 ints, got 1.0"),
    ((x0, k0), {"padding": 1, "stride": None}, ValueError, "stride must be an int or 2 ints, got None"),
    ((x0, k0), {"padding": 1, "stride": True}, ValueError, "stride must be an int or 2 ints, got True"),
    ((x0, k0), {"padding": "full"}, ValueError, "padding must be .*\"same\".*'full'"),
    ((x0, k0), {"padding": "same", "stride": 2}, ValueError, "stride 1, got stride"),
    ((x0, k0), {"dilation": 9}, ValueError, "reaches over 19 positions"),
    ((x0, k0), {"padding": 1, "dilation": 2**30}, ValueError, "reaches over"),
    ((x0, k0), {"padding": 1, "dilation": 2**60}, ValueError, "dilation must be at most"),
    ((x0, k0), {"padding": 1, "stride": 2**63}, ValueError, "stride must be at most"),
    ((x0, k0), {"padding": 2**31}, ValueError, "padding must be at most"),
    ((x0.to_sparse(), k0), {}, TypeError, "input must be a strided"),
]


@pytest.mark.parametrize(("arguments", "options", "error", "message"), BAD)
def test_errors_name_the_bad_argument(arguments, options, error, message) -> None:
    with pytest.raises(error, match=message):
        involution2d(*arguments, **options)


def directly(name: str, first, second, size, stride=(1, 1), padding=(1, 1), dilation=(1, 1)):
    return getattr(torch.ops.involution, name)(first, second, size, stride, padding, dilation)


WRONG_SIZES = [
    ("apply", (x0, k0, [2, 4, 5, 7]), "do not fit each other"),
    ("adjoint", (x0, k0, [2, 6, 5, 6]), "do not fit each other"),
    ("correlate", (x0, x0, [2, 3, 3, 3, 5, 6]), "do not fit each other"),
    ("apply", (x0, k0, [2, 4, 5, 6], (0, 1)), "must be positive"),
    ("correlate", (x0, x0, [2, 2, 3, 3, 5, 6], (1, 1), (-1, -1)), "not negative"),
    ("apply", (x0, k0, [2, 4, 5, 6], (1, 1), (1, 1), (2**63 - 1, 1)), "at most"),
    ("adjoint", (x0, k0, [2, 4, 5, 6], (2**62, 1)), "at most"),
    ("correlate", (x0, x0[:, :, :0], [2, 2, 3, 3, 5, 6]), "may be empty"),
]


@pytest.mark.parametrize(("name", "arguments", "message"), WRONG_SIZES)
@pytest.mark.parametrize("channels_last", [False, True])
def test_registered_operators_reject_invalid_geometries(name, arguments, message, channels_last) -> None:
    """The kernels trust the geometry, so the operators check it for callers that bypass the public functions."""
    first, *rest = arguments
    if channels_last:
        first = first.to(memory_format=torch.channels_last)
    with pytest.raises(ValueError, match=message):
        directly(name, first, *rest)


def test_registered_operators_reject_different_dtypes_and_devices() -> None:
    for first, second in ((x0, k0.double()), (x0.int(), k0.int()), (x0, k0.to("meta"))):
        with pytest.raises(TypeError, match=r"one floating dtype on one device"):
            torch.ops.involution.apply.default.redispatch(
                torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), first, second, [2, 4, 5, 6], [1, 1], [1, 1], [1, 1]
            )


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("channels_last", [False, True])
def test_windows_far_outside_the_input(name: str, channels_last: bool) -> None:
    """The largest stride, padding and dilation that the public functions accept."""
    largest = 2**31 - 1
    x, k = torch.randn(1, 16, 8, dtype=torch.float64), torch.randn(1, 1, 2, 2, dtype=torch.float64)
    if channels_last:
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    # Taps at (o - 1 + u) * largest, so that only (o, u) = (0, 1) and (1, 0) are inside the input, both at 0.
    with backend(name):
        y = involution1d(x.requires_grad_(), k.requires_grad_(), stride=largest, padding=largest, dilation=largest)
        dx, dk = torch.autograd.grad(y.sum(), (x, k))
    expected = torch.zeros_like(y)
    expected[..., 0], expected[..., 1] = k[0, 0, 1, 0] * x[..., 0], k[0, 0, 0, 1] * x[..., 0]
    torch.testing.assert_close(y, expected)
    assert dx[..., 1:].count_nonzero() == 0
    assert dk.count_nonzero() == 2


def test_numpy_integers_are_integers() -> None:
    one = np.int64(1)
    assert torch.equal(involution2d(x0, k0, one, (one, one), one), involution2d(x0, k0, 1, 1, 1))
    assert torch.equal(involution2d(x0, k0, padding=np.array([1, 1])), involution2d(x0, k0, 1, 1, 1))


def test_the_package_has_all_of_its_public_names() -> None:
    for name in involution.__all__:
        assert getattr(involution, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = involution.nothing
