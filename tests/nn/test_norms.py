"""norm_act, against the modules that it replaces: outputs, gradients, gradients of gradients, running statistics."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from involution import zoo  # noqa: F401  (registers RedNet)
from involution.nn import ChannelL2Norm, norms
from involution.nn.norms import norm_act
from involution.ops.backends import cpu_norm
from involution.ops.backends.cpu_library import library

pytestmark = pytest.mark.skipif(library() is None, reason="no CPU kernels")


def channels_last(tensor: Tensor) -> Tensor:
    return tensor.movedim(1, -1).contiguous().movedim(-1, 1)


def batch_norm(channels: int, dtype: torch.dtype) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(channels, eps=1e-3, momentum=0.3).to(dtype)
    nn.init.uniform_(norm.weight, -1, 1)
    nn.init.normal_(norm.bias)
    return norm


@contextmanager
def counted() -> Iterator[list[str]]:
    """The names of the kernels that are called."""
    calls: list[str] = []

    def record(name):
        calls.append(name)
        return function(name)

    function = cpu_norm.function
    with mock.patch.object(cpu_norm, "function", record):
        yield calls


def modules(input: Tensor, norm: nn.Module, relu: bool, shortcut: Tensor | None) -> Tensor:
    output = norm(input)
    output = output if shortcut is None else output + shortcut
    return F.relu(output) if relu else output


@settings(deadline=None, max_examples=60)
@given(
    kind=st.sampled_from(["batch", "channel"]),
    batch=st.integers(1, 9),
    channels=st.integers(1, 70),
    height=st.integers(1, 13),
    width=st.integers(2, 13),
    relu=st.booleans(),
    with_shortcut=st.booleans(),
    expanded=st.booleans(),
    seed=st.integers(0, 9999),
)
def test_agrees_with_the_modules(kind, batch, channels, height, width, relu, with_shortcut, expanded, seed):
    """In float64, with a mean far from zero; the gradient channels last, or expanded as a mean's is."""
    torch.manual_seed(seed)
    shape = (batch, channels, height, width)
    input = channels_last(torch.randn(shape, dtype=torch.float64) + 1000 * (kind == "batch"))
    shortcut = channels_last(torch.randn(shape, dtype=torch.float64)) if with_shortcut and kind == "batch" else None
    grad = torch.randn(batch, channels, 1, 1, dtype=torch.float64).expand(shape)
    grad = grad if expanded else channels_last(torch.randn_like(input))
    ours = batch_norm(channels, torch.float64) if kind == "batch" else ChannelL2Norm()
    theirs = copy.deepcopy(ours)
    inputs = [one.requires_grad_() for one in (input, shortcut) if one is not None]
    with counted() as calls:
        output = norm_act(input, ours, nn.ReLU() if relu else None, shortcut)
        found = torch.autograd.grad(output, [*inputs, *ours.parameters()], grad)
    assert sum("backward" in name for name in calls) == 1
    expected_output = modules(input, theirs, relu, shortcut)
    expected = torch.autograd.grad(expected_output, [*inputs, *theirs.parameters()], grad)
    torch.testing.assert_close(output, expected_output, rtol=1e-9, atol=1e-9)
    assert output.stride() == input.stride()
    for a, b in zip((*found, *ours.buffers()), (*expected, *theirs.buffers()), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("kind", ["batch", "channel"])
@pytest.mark.parametrize("isa", ["avx512", "avx2", "baseline"])
def test_float32_on_every_instruction_set(kind, isa):
    """Against float64; 5 channels beyond whole vectors, 1,300 rows in several chunks."""
    kernels, name = library(), torch.float32
    before = kernels.involution_instruction_set()
    if not kernels.involution_use(isa.encode()):
        pytest.skip(f"no {isa} here")
    try:
        torch.manual_seed(0)
        norm = batch_norm(37, name) if kind == "batch" else ChannelL2Norm()
        input = channels_last(torch.randn(13, 37, 10, 10) + 3).requires_grad_()
        grad = channels_last(torch.randn(13, 37, 10, 10))
        exact = input.detach().double().requires_grad_()
        expected = modules(exact, copy.deepcopy(norm).double(), True, None)
        [dx] = torch.autograd.grad(expected, exact, grad.double() * (expected.abs() > 1e-5))
        output = norm_act(input, norm, nn.ReLU())
        [found] = torch.autograd.grad(output, input, grad * (expected.abs() > 1e-5))
    finally:
        kernels.involution_use(before)
    torch.testing.assert_close(output.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.double(), dx, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["batch", "channel"])
def test_gradients_of_gradients(kind):
    torch.manual_seed(0)
    input = channels_last(torch.randn(2, 5, 3, 2, dtype=torch.float64)).requires_grad_()
    norm = batch_norm(5, torch.float64) if kind == "batch" else ChannelL2Norm()
    shortcut = channels_last(torch.randn(2, 5, 3, 2, dtype=torch.float64)).requires_grad_()
    operands = (input, shortcut) if kind == "batch" else (input,)

    def call(*given):
        return norm_act(given[0], norm, nn.ReLU(), *given[1:])

    assert torch.autograd.gradcheck(call, operands)
    assert torch.autograd.gradgradcheck(call, operands)


@pytest.mark.parametrize("kind", ["batch", "channel"])
def test_a_norm_that_is_applied_twice_under_create_graph(kind):
    """Its parameters' gradients count every application once; gradients of gradients too."""
    torch.manual_seed(0)
    norm = batch_norm(4, torch.float64) if kind == "batch" else ChannelL2Norm()
    input = channels_last(torch.randn(3, 4, 2, 2, dtype=torch.float64)).requires_grad_()
    operands = [input, *norm.parameters()]

    def gradients(call):
        output = call(channels_last(call(input) * 2))
        first = torch.autograd.grad((output**3).sum(), operands, create_graph=True)
        return *first, *torch.autograd.grad(sum((one**2).sum() for one in first), operands)

    ours = gradients(lambda x: norm_act(x, norm, nn.ReLU()))
    theirs = gradients(lambda x: modules(x, norm, True, None))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("relu", [True, False])
def test_only_the_shortcut_requires_a_gradient(relu):
    norm, image = batch_norm(4, torch.float64).requires_grad_(False), channels_last(torch.randn(2, 4, 3, 3).double())
    shortcut = channels_last(torch.randn(2, 4, 3, 3).double()).requires_grad_()
    for create_graph in (False, True):
        output = norm_act(image, norm, nn.ReLU() if relu else None, shortcut)
        [found] = torch.autograd.grad(output.sum(), shortcut, create_graph=create_graph)
        torch.testing.assert_close(found, (output > 0).double() if relu else torch.ones_like(found))


def test_an_output_without_relu_may_be_changed_in_place():
    norm, image = batch_norm(4, torch.float32), channels_last(torch.randn(2, 4, 3, 3)).requires_grad_()
    norm_act(image, norm, None, channels_last(torch.randn(2, 4, 3, 3))).add_(1).sum().backward()
    norm.bias.grad += norm.weight.detach()


@pytest.mark.parametrize("kind", ["batch", "channel"])
def test_batched_and_dual_gradients(kind):
    """is_grads_batched, and forward mode over the backward pass."""
    torch.manual_seed(0)
    norm = batch_norm(4, torch.float64) if kind == "batch" else ChannelL2Norm()
    image = channels_last(torch.randn(2, 4, 3, 2, dtype=torch.float64)).requires_grad_()
    grads = torch.randn(3, 2, 4, 3, 2, dtype=torch.float64)
    ours, theirs = norm_act(image, norm, nn.ReLU()), modules(image, norm, True, None)

    def batched(output):
        return torch.autograd.grad(output, image, grads, is_grads_batched=True, retain_graph=True)[0]

    def dual(output):
        with torch.autograd.forward_ad.dual_level():
            grad = torch.autograd.forward_ad.make_dual(grads[0], grads[1])
            [found] = torch.autograd.grad(output, image, grad, retain_graph=True)
            return torch.autograd.forward_ad.unpack_dual(found).tangent

    for call in (batched, dual):
        torch.testing.assert_close(call(ours), call(theirs), rtol=1e-9, atol=1e-9)


def test_a_default_device_does_not_move_the_workspace():
    norm, image = batch_norm(4, torch.float32), channels_last(torch.randn(2, 4, 3, 3))
    expected = norm_act(image, copy.deepcopy(norm))
    with torch.device("meta"):
        found = norm_act(image, norm)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("shape", [(2, 1, 3, 3), (2, 8, 3, 3), (2, 4, 3), (4,)], ids=str)
def test_what_does_not_fit_is_refused_as_torch_refuses_it(shape):
    image = torch.randn(shape)
    with pytest.raises((RuntimeError, ValueError)):
        norm_act(channels_last(image) if len(shape) > 1 else image, nn.BatchNorm2d(4))


def test_parameters_on_another_device_are_refused_as_torch_refuses_them():
    with pytest.raises(RuntimeError):
        norm_act(channels_last(torch.randn(2, 4, 3, 3)), nn.BatchNorm2d(4, device="meta"))


def test_an_outlier_in_the_first_row_costs_no_precision():
    torch.manual_seed(0)
    image = torch.randn(16, 8, 14, 14)
    image[0, :, 0, 0] = 100
    image, norm = channels_last(image), nn.BatchNorm2d(8)
    exact = copy.deepcopy(norm).double()(image.double())[1:]
    torch.testing.assert_close(norm_act(image, norm)[1:].double(), exact, rtol=0, atol=2e-5)


def test_the_same_for_every_number_of_threads():
    torch.manual_seed(0)
    norm, input = batch_norm(32, torch.float32), channels_last(torch.randn(16, 32, 24, 24)).requires_grad_()
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            output = norm_act(input, copy.deepcopy(norm), nn.ReLU())
            results.append((output, *torch.autograd.grad(output.sum(), (input,))))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_a_large_output_is_streamed_past_the_caches():
    """16 MiB, from which on the kernels write with non-temporal stores."""
    torch.manual_seed(0)
    norm, input = batch_norm(64, torch.float32), channels_last(torch.randn(4, 64, 128, 129))
    torch.testing.assert_close(norm_act(input, copy.deepcopy(norm)), norm(input), rtol=1e-4, atol=1e-4)


def test_nan_and_infinity_stay():
    norm = batch_norm(2, torch.float64)
    input = channels_last(torch.ones(2, 2, 2, 2, dtype=torch.float64))
    input[0, 1, 0, 0] = float("nan")
    output = norm_act(input, norm, nn.ReLU())
    assert output[:, 1].isnan().all()
    assert output[:, 0].isfinite().all()


def cases():
    image = channels_last(torch.randn(2, 4, 3, 3))
    hooked = nn.BatchNorm2d(4)
    hooked.register_forward_hook(lambda *_: None)
    own_forward, later = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
    own_forward.forward = lambda input: input + 1
    later.track_running_stats = False
    yield "a forward of its own", image, own_forward, nn.ReLU()
    yield "no running statistics from now on", image, later, nn.ReLU()
    yield "negated on reading", torch._neg_view(image), nn.BatchNorm2d(4), nn.ReLU()
    yield "contiguous", image.contiguous(), nn.BatchNorm2d(4), nn.ReLU()
    yield "bfloat16", image.bfloat16(), nn.BatchNorm2d(4).bfloat16(), nn.ReLU()
    yield "evaluation", image, nn.BatchNorm2d(4).eval(), nn.ReLU()
    yield "without scale", image, nn.BatchNorm2d(4, affine=False), nn.ReLU()
    yield "no running statistics", image, nn.BatchNorm2d(4, track_running_stats=False), nn.ReLU()
    yield "cumulative mean", image, nn.BatchNorm2d(4, momentum=None), nn.ReLU()
    yield "another activation", image, nn.BatchNorm2d(4), nn.SiLU()
    yield "another norm", image, nn.GroupNorm(1, 4), nn.ReLU()
    yield "a hook", image, hooked, nn.ReLU()


@pytest.mark.parametrize("case", list(cases()), ids=lambda case: case[0])
def test_everything_else_calls_the_modules(case):
    _, image, norm, act = case
    expected = act(copy.deepcopy(norm)(image))
    with counted() as calls:
        found = norm_act(image, norm, act)
    assert not calls
    torch.testing.assert_close(found, expected)


def test_a_single_value_per_channel_is_refused_as_torch_refuses_it():
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        norm_act(torch.randn(1, 4, 1, 1), nn.BatchNorm2d(4), nn.ReLU())


def test_transforms_and_tracing_call_the_modules():
    norm, image = nn.BatchNorm2d(4), channels_last(torch.randn(2, 4, 3, 3))
    with counted() as calls:
        torch.func.jvp(lambda x: norm_act(x, ChannelL2Norm(), nn.ReLU()), (image,), (image,))
        torch.jit.trace(lambda x: norm_act(x, norm.requires_grad_(False), nn.ReLU()), image, check_trace=False)
        with torch.autocast("cpu"):
            norm_act(image, norm, nn.ReLU())
        with FlopCounterMode(display=False):
            norm_act(image, norm, nn.ReLU())
    assert not calls


@pytest.mark.parametrize("name", ["rednet14_cifar", "rednetv2_14_cifar"])
def test_a_networks_training_step_is_that_of_its_modules(name):
    """Loss, gradients and running statistics of a RedNet, with the operator and without."""
    torch.manual_seed(0)
    ours = timm.create_model(name, zero_init_last=False).double().to(memory_format=torch.channels_last)
    theirs = copy.deepcopy(ours)
    images = torch.randn(4, 3, 32, 32, dtype=torch.float64).to(memory_format=torch.channels_last)
    with counted() as calls:
        ours(images).square().sum().backward()
    assert len(calls) > 20
    with mock.patch.object(norms, "_serves", return_value=False):
        theirs(images).square().sum().backward()
    for (label, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-6, atol=1e-8, msg=label)
    for a, b in zip(ours.buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(a, b)
