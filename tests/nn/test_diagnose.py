"""diagnose: names the problem of a network, and does not change the network."""

import math
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import involution.zoo  # noqa: F401  (registers the models)
from involution.nn import Involution1d, Involution2d, Involution3d, LinearGenerator, LocalSelfAttention2d, diagnose
from involution.nn.signal import growth_of, rms


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


class Fixed(nn.Module):
    """Identity kernels times a constant, or times the mean of the input's absolute values."""

    def __init__(self, gain: float, grows: bool = False) -> None:
        super().__init__()
        self.gain, self.grows = gain, grows

    def forward(self, x: Tensor) -> Tensor:
        kernel = torch.zeros(x.shape[0], 1, 3, 3, *x.shape[2:], dtype=x.dtype)
        kernel[:, :, 1, 1] = self.gain
        return kernel * x.abs().mean() if self.grows else kernel


def chain(*gains: float, grows: bool = False) -> nn.Sequential:
    layers = [Involution2d(8, 3, group_channels="all", kernel_generator=Fixed(gain, grows)) for gain in gains]
    return nn.Sequential(*layers)


def test_values_by_hand() -> None:
    x = torch.randn(2, 8, 5, 6, requires_grad=True)
    found = diagnose(chain(2.0, 0.5), x, loss=lambda y: y.sum())
    first, second = found.layers
    assert (first.name, second.name) == ("0", "1")
    size = x.square().mean().sqrt().item()
    assert (first.input, first.output, second.output) == pytest.approx((size, 2 * size, size))
    assert (first.kernel, second.kernel) == pytest.approx((2 / 3, 0.5 / 3))  # one of nine taps
    assert (*first.taps, *second.taps) == pytest.approx((2, 0, 0.5, 0))
    assert (first.gradient, second.gradient) == pytest.approx((1, 0.5))
    assert first.generator_gradient is None  # no parameters
    assert (first.growth, second.growth, found.growth) == pytest.approx((1, 1, 1))
    assert (first.evaluation, second.evaluation) == pytest.approx((2 * size, size))
    assert found.loss == pytest.approx(x.sum().item(), rel=1e-5)
    assert found.healthy
    text = str(found)
    assert text.splitlines()[2].split() == [
        *("layer", "input", "kernel", "output", "sum", "of", "taps", "gradient", "generator", "evaluation", "growth")
    ]
    assert "healthy: signal and gradients keep their size" in text
    assert x.grad is None


@pytest.mark.parametrize(
    ("network", "problem"),
    [
        (
            chain(50.0, 50.0),
            "exploding in training: the output of 1 has RMS .* where the input of 0 has .*: use a kernel",
        ),
        (chain(1.0, 1e-4), "vanishing: 1: the first turns RMS"),
        (chain(1.0, 0.0), "dead generator: 1: kernels are zero"),
        (
            chain(1.0, 1e20, 1e20),
            r"non-finite in training: 2 \(Involution2d\) is the first that returns NaN or infinity",
        ),
        (chain(1.0, 1.0, grows=True), "growing: doubling the input makes the network's output in evaluation grow by 2"),
        (chain(1.0, 1e-3, 1e-3, 1e-3, 1.0), "vanishing gradients: RMS .* at the input of 0, .* at that of 4"),
        (chain(10.0, 10.0, 10.0, 10.0, 10.0, 10.0), "exploding gradients: RMS .* at the input of 0"),
    ],
)
def test_problems(network: nn.Module, problem: str) -> None:
    import re

    found = diagnose(network, torch.randn(2, 8, 5, 6, requires_grad=True), loss=lambda y: y.sum())
    assert not found.healthy
    assert any(re.match(problem, one) for one in found.problems), found
    assert any(one in str(found) for one in found.problems)


def test_a_layer_of_degree_two() -> None:
    found = diagnose(chain(1.0, 1.0, grows=True), torch.randn(2, 8, 5, 6))
    assert [one.growth for one in found.layers] == pytest.approx([2, 2])
    assert found.growth == pytest.approx(4)
    assert "2 of 2 layers grow with their input to the power of 2 in evaluation" in found.notes[0]


class Random(nn.Module):
    """The paper's generator at initialisation: kernels of random signs."""

    def __init__(self, channels: int, kernel_size: Any, groups: int, stride: Any, dilation: Any) -> None:
        super().__init__()
        self.shape = (groups, *kernel_size)
        self.reduce, self.norm = nn.Conv2d(channels, channels // 4, 1), nn.BatchNorm2d(channels // 4)
        self.span = nn.Conv2d(channels // 4, math.prod(self.shape), 1)

    def forward(self, x: Tensor) -> Tensor:
        span: Tensor = self.span(self.norm(self.reduce(x)).relu())
        return span.unflatten(1, self.shape)


def test_a_dead_generator() -> None:
    generator = Random(16, (3, 3), 1, (1, 1), (1, 1))
    layer = Involution2d(16, 3, kernel_generator=generator)
    network = nn.Sequential(nn.Conv2d(3, 16, 1), layer, nn.Conv2d(16, 2, 1))
    assert not any("dead" in one for one in diagnose(network, torch.randn(2, 3, 8, 8)).problems)
    nn.init.constant_(generator.norm.bias, -100)
    found = diagnose(network, torch.randn(2, 3, 8, 8))
    assert found.layers[0].generator_gradient == 0
    [problem] = found.problems
    assert problem.startswith("dead generator: 1: kernels are zero, or the same everywhere")


def test_blocks_that_start_as_their_shortcut_are_a_note() -> None:
    network = nn.Sequential(nn.Conv2d(3, 16, 1), Involution2d(16, 3), nn.BatchNorm2d(16), nn.Conv2d(16, 2, 1))
    nn.init.zeros_(network[2].weight)  # type: ignore[arg-type]
    found = diagnose(network, torch.randn(2, 3, 8, 8))
    assert found.healthy
    assert any(note.startswith("no gradient reaches 1: expected in the first step") for note in found.notes)


def test_non_finite_inputs_and_parameters_are_named_first() -> None:
    network = timm.create_model("rednet14_cifar")
    images = torch.randn(2, 3, 32, 32)
    images[0, 0, 0, 0] = math.nan
    assert diagnose(network, images).problems[0].startswith("non-finite batch: it holds NaN")
    with torch.no_grad():
        network.layer1[0].bn1.running_var[0] = math.nan
    found = diagnose(network, torch.randn(2, 3, 32, 32))
    assert found.problems[0].startswith("non-finite in evaluation, but not in training: layer1.0.bn1 (BatchNorm2d)")
    assert found.problems[1].startswith("non-finite running statistics: layer1.0.bn1.running_var: they never recover")
    with torch.no_grad():
        network.layer2[0].conv1.weight[0] = math.inf
    [problem] = diagnose(network, torch.randn(2, 3, 32, 32)).problems
    assert problem.startswith("non-finite parameters: layer2.0.conv1.weight: resume from the last good")


def test_the_first_faulty_module_may_be_any() -> None:
    class Log(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x - 1e3).log()

    network = nn.Sequential(nn.Conv2d(3, 16, 1), Log(), Involution2d(16, 3))
    [problem, *_] = diagnose(network, torch.randn(2, 3, 8, 8)).problems
    assert problem.startswith("non-finite in training: 1 (Log) is the first")
    finite = nn.Sequential(nn.Conv2d(3, 16, 1))
    found = diagnose(finite, torch.randn(2, 3, 8, 8), loss=lambda y: y.sum() * math.nan)
    assert found.problems == [
        "non-finite loss of a finite output (nan): look at the loss and at the targets",
    ]
    assert "no involution was called" in str(found)


def test_stale_running_statistics() -> None:
    """The norm divides by the running variance in evaluation, and by the batch's in training."""
    norm: Any = nn.BatchNorm2d(8, eps=1e-20)
    norm.running_var.fill_(1e-20)
    network = nn.Sequential(norm, *chain(1.0, 1.0, 1.0, grows=True))
    [problem, *_] = diagnose(network, torch.randn(4, 8, 5, 6)).problems
    assert problem.startswith("non-finite in evaluation, but not in training: 2 (Involution2d) is the first")
    norm.running_var.fill_(1e-4)
    [problem] = diagnose(nn.Sequential(norm, *chain(1.0)), torch.randn(4, 8, 5, 6)).problems
    assert problem.startswith("evaluation far from training: the output of 1 has RMS 1")


@pytest.mark.parametrize("training", [True, False])
def test_the_model_does_not_change(training: bool) -> None:
    network = timm.create_model("rednet14_cifar", drop_rate=0.5, drop_path_rate=0.5, zero_init_last=False)
    network.train(training)
    network.layer1.train(not training)
    images = torch.randn(4, 3, 32, 32)
    network(images).sum().backward()
    before = {name: one.clone() for name, one in network.state_dict().items()}
    gradients = {name: one.grad.clone() for name, one in network.named_parameters()}
    identities = {name: id(one) for name, one in network.named_buffers()}
    modes = [module.training for module in network.modules()]
    hooks = [len(module._forward_hooks) for module in network.modules()]
    state = torch.get_rng_state()
    with torch.inference_mode():
        found = diagnose(network, images)
    assert len(found.layers) == 5
    assert all(one.gradient for one in found.layers)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(one, before[name]) for name, one in network.state_dict().items())
    assert all(torch.equal(one.grad, gradients[name]) for name, one in network.named_parameters())
    assert {name: id(one) for name, one in network.named_buffers()} == identities
    assert [module.training for module in network.modules()] == modes
    assert [len(module._forward_hooks) for module in network.modules()] == hooks
    with pytest.raises(RuntimeError, match="channels"):
        diagnose(network, torch.randn(4, 5, 32, 32))
    assert [len(module._forward_hooks) for module in network.modules()] == hooks
    assert [module.training for module in network.modules()] == modes


@pytest.mark.parametrize("memory_efficient", [True, False])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_every_dimension_batched_and_unbatched(dims: int, memory_efficient: bool) -> None:
    kind: Any = (Involution1d, Involution2d, Involution3d)[dims - 1]
    layer = kind(16, 3, norm_layer=nn.Identity, memory_efficient=memory_efficient)
    network = nn.Sequential((nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1](2, 16, 1), layer)
    batched = diagnose(network, torch.randn(1, 2, *[6] * dims))
    assert batched.layers[0].generator_gradient
    torch.manual_seed(1)
    x = torch.randn(2, *[6] * dims)
    for ours, theirs in zip(
        diagnose(network, x).layers[0][1:4], diagnose(network, x[None]).layers[0][1:4], strict=True
    ):
        assert ours == pytest.approx(theirs, rel=1e-5)


def test_other_generators_and_shared_layers() -> None:
    shared = Involution2d(16, 3, kernel_generator=LinearGenerator)
    network = nn.Sequential(shared, LocalSelfAttention2d(16, 3, heads=2), shared)
    found = diagnose(network, torch.randn(2, 16, 8, 8))
    assert [one.name for one in found.layers] == ["0", "1"]
    assert found.layers[1].taps == pytest.approx((1, 0), abs=1e-5)  # of a softmax


def test_nested_outputs() -> None:
    class Odd(nn.Module):
        def __init__(self, kind: str) -> None:
            super().__init__()
            self.kind, self.layer = kind, nn.Sequential(nn.Conv2d(3, 16, 1), Involution2d(16, 3))

        def forward(self, images: list[Tensor], targets: Tensor | None = None) -> Any:
            y = self.layer(torch.stack(images))
            if self.kind == "detector":
                return {"a": y.mean(), "b": y.square().mean()} if self.training else [{"boxes": y}]
            return {"features": {"a": y}, "index": torch.zeros(2).long()} if self.kind == "features" else ["none"]

    images = [torch.randn(3, 8, 8), torch.randn(3, 8, 8)]
    found = diagnose(Odd("detector"), (images, torch.ones(2)))
    assert found.growth is None
    assert found.layers[0].gradient
    assert diagnose(Odd("features"), images).growth is not None
    with pytest.raises(ValueError, match="loss must be given for a model without a floating-point output, got list"):
        diagnose(Odd("text"), images)
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got function"):
        diagnose(chain, images)  # type: ignore[arg-type]


def test_half_precision_and_large_values() -> None:
    network = nn.Sequential(nn.Conv2d(3, 16, 1), Involution2d(16, 3))
    with torch.autocast("cpu", torch.bfloat16):
        found = diagnose(network, torch.randn(2, 3, 8, 8))
    assert found.healthy
    assert rms(torch.full((5,), 1e30), torch.full((3,), -1e30)) == pytest.approx(1e30)
    assert rms(torch.full((5,), 6e4).half()) == pytest.approx(6e4, rel=1e-3)
    assert rms() == 0
    assert math.isnan(rms(torch.tensor([1.0, math.nan])))
    assert growth_of([torch.ones(3)], lambda: [torch.full((3,), math.inf)]) == math.inf
    assert growth_of([torch.zeros(3)], lambda: [torch.ones(3)]) is None
    assert growth_of([torch.ones(3)], lambda: [torch.zeros(3)]) == -math.inf


def test_eight_layers_of_random_kernels() -> None:
    """A reported problem: a neck's 3x3 convolutions, without norms, replaced; the loss is NaN."""
    layers = [Involution2d(64, 7, kernel_generator=Random) for _ in range(8)]
    found = diagnose(nn.Sequential(*layers), torch.randn(2, 64, 12, 12))
    assert [one.name for one in found.layers] == [str(index) for index in range(8)]
    assert any(one.startswith("exploding in training") for one in found.problems)
