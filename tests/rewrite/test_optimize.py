"""optimize: the model's results from fused operators, and its reasons where it cannot fuse."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import involution.zoo  # registers rednet14_cifar
from involution import Involution1d, Involution2d, Involution3d, optimize
from involution.nn import BottleneckGenerator
from involution.nn.generators import ChannelL2Norm
from involution.ops.backends import selection
from involution.rewrite.fusion import fuse
from involution.rewrite.graph import constant, mutates_shared_tensor

BOTTLENECK = torch.ops.involution.fused_bottleneck.default
LAYER = {1: Involution1d, 2: Involution2d, 3: Involution3d}
CONVOLUTION = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
NORM = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


@pytest.fixture(autouse=True)
def _fresh() -> None:
    """An empty compilation cache, and the same weights every time."""
    torch._dynamo.reset()
    torch.manual_seed(0)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[fx.GraphModule]:
    """The rewritten graphs; they run uncompiled, because Inductor takes seconds for each."""
    seen: list[fx.GraphModule] = []

    def run_uncompiled(graph: fx.GraphModule, inputs: list[Any], options: Any = None) -> Callable[..., Any]:
        seen.append(graph)
        return graph.forward

    monkeypatch.setattr(torch._inductor, "compile", run_uncompiled)
    return seen


def settle(model: nn.Module, x: Tensor) -> nn.Module:
    """The model in evaluation mode, with non-trivial kernels and norms whose statistics are near those of `x`."""
    for module in model.modules():
        if isinstance(module, BottleneckGenerator):
            module.span.reset_parameters()
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        if norm.affine:
            nn.init.uniform_(norm.weight, 0.4, 1.2)
            nn.init.normal_(norm.bias, std=0.3)
        norm.momentum = 1.0
    with torch.no_grad():
        model.train()(x)
        for norm in norms:
            if norm.track_running_stats:
                norm.running_mean += 0.2 * torch.randn_like(norm.running_mean)
                norm.running_var *= 0.5 + torch.rand_like(norm.running_var)
    return model.eval()


def tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    return [t for part in (output.values() if isinstance(output, dict) else output) for t in tensors(part)]


def assert_same(optimized: nn.Module, model: nn.Module, *inputs: Tensor, **options: Any) -> None:
    with torch.no_grad():
        want = model(*(x.clone() for x in inputs), **options)
    got = optimized(*(x.clone() for x in inputs), **options)
    assert type(got) is type(want)
    assert len(tensors(got)) == len(tensors(want)) > 0
    for a, b in zip(tensors(got), tensors(want), strict=True):
        assert a.shape == b.shape
        assert not a.requires_grad
        assert float((a - b).norm()) <= 1e-4 * float(b.norm())
        assert float(b.norm()) > 0


def calls(graphs: list[fx.GraphModule], target: Any) -> list[dict[str, Any]]:
    """The arguments, by name, of every call of an operator in the graphs."""
    names = [argument.name for argument in target._schema.arguments]
    nodes = [node for graph in graphs for node in graph.graph.nodes if node.target is target]
    return [dict(zip(names, node.args, strict=True)) | node.kwargs for node in nodes]


def capture(model: nn.Module, x: Tensor) -> fx.GraphModule:
    """TorchDynamo's graph of a model in evaluation mode, weights included."""
    seen: list[fx.GraphModule] = []

    def keep(graph: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        seen.append(graph)
        return graph.forward

    with torch.no_grad(), torch._inductor.config.patch(freezing=True):
        torch.compile(model, backend=keep)(x)
    (graph,) = seen
    return graph


class Net(nn.Module):
    """A stem, one bottleneck around an involution, and a head; subclasses omit or change parts."""

    def __init__(self, dims: int = 2, stride: int = 1, **options: Any) -> None:
        super().__init__()
        convolution, norm = CONVOLUTION[dims], NORM[dims]
        self.start, self.start_norm = convolution(3, 32, 1, bias=False), norm(32)
        self.middle, self.middle_norm = LAYER[dims](32, 3, stride, **options), norm(32)
        self.end, self.end_norm = convolution(32, 24, 1), norm(24)
        self.shortcut = convolution(32, 24, 1, stride=stride)
        self.after, self.after_norm = convolution(24, 8, 1), norm(8)
        self.act = nn.ReLU(inplace=True)

    def begin(self, x: Tensor) -> Tensor:
        return self.act(self.start_norm(self.start(x)))

    def bottleneck(self, x: Tensor) -> Tensor:
        y = self.act(self.middle_norm(self.middle(x)))
        return self.act(self.end_norm(self.end(y)) + self.shortcut(x))

    def finish(self, y: Tensor) -> Tensor:
        return self.act(self.after_norm(self.after(y)))

    def forward(self, x: Tensor) -> Any:
        return self.finish(self.bottleneck(self.begin(x)))


@pytest.mark.parametrize("name", ["rednet14_cifar", "rednetv2_14_cifar"])
def test_rednet_compiled_by_inductor(name: str) -> None:
    x = torch.randn(2, 3, 32, 32)
    model = settle(timm.create_model(name), torch.randn(8, 3, 32, 32))
    optimized = optimize(model, x)
    assert_same(optimized, model, x)
    assert_same(optimized, model, 3 * torch.randn(2, 3, 32, 32))
    assert_same(optimized, model, torch.randn(3, 3, 27, 40))
    assert optimized.unfused == []


def test_resnet_compiled_by_inductor() -> None:
    x = torch.randn(2, 3, 64, 64)
    model = settle(timm.create_model("resnet14t", num_classes=10), torch.randn(8, 3, 64, 64))
    optimized = optimize(model, x)
    assert_same(optimized, model, x)
    assert_same(optimized, model, torch.randn(2, 3, 64, 64))
    assert optimized.unfused == []


@pytest.mark.parametrize("name", ["rednet14_cifar", "rednetv2_14_cifar"])
def test_every_involution_of_a_rednet_is_fused_with_its_neighbours(graphs: list[fx.GraphModule], name: str) -> None:
    x = torch.randn(2, 3, 32, 32)
    model = settle(timm.create_model(name), x)
    optimized = optimize(model, x)
    assert optimized.unfused == []
    (graph,) = graphs
    found = calls(graphs, BOTTLENECK)
    assert len(found) == 5  # the stem's and one a stage
    assert [call["expand_weight"] is not None for call in found] == [False, True, True, True, True]
    assert [call["shortcut"] is not None for call in found] == [False, True, True, True, True]
    assert [call["next_reduce_weight"] is not None for call in found] == [False, True, True, True, False]
    assert all(call["scale"] is not None and call["relu"] for call in found)
    assert {call["rms_eps"] > 0 for call in found} == {name.startswith("rednetv2")}
    left = [node.target for node in graph.graph.nodes]
    operators = torch.ops.involution
    assert not {operators.fused_layer.default, operators.apply.default, F.rms_norm, torch.rms_norm} & set(left)
    # The norms that remain: of the stem's two convolutions, one before the first block, and four shortcuts.
    assert left.count(F.batch_norm) == 7
    assert_same(optimized, model, torch.randn(5, 3, 33, 31))


def test_other_sizes_and_batches_of_a_resnet(graphs: list[fx.GraphModule]) -> None:
    model = settle(timm.create_model("resnet14t", num_classes=10), torch.randn(4, 3, 64, 64))
    optimized = optimize(model, torch.randn(2, 3, 64, 64))
    assert_same(optimized, model, torch.randn(3, 3, 65, 70))
    assert optimized.unfused == []


def test_many_sizes_take_few_graphs(graphs: list[fx.GraphModule]) -> None:
    x = torch.randn(2, 3, 12, 12)
    model = settle(Net(), x)
    optimized = optimize(model, x)
    for size in (12, 9, 16, 17, 20, 31):
        assert_same(optimized, model, torch.randn(2, 3, size, size + 2))
    assert 1 <= len(graphs) <= 3


def test_fuse_rewrites_a_captured_graph() -> None:
    x = torch.randn(2, 3, 9, 9)
    model = settle(Net(), x)
    with torch.no_grad():
        want = model(x)
    graph = capture(model, x)
    assert calls([graph], BOTTLENECK) == []
    assert fuse(graph) == []
    assert len(calls([graph], BOTTLENECK)) == 1
    (got,) = graph(x)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_the_given_model_does_not_change(graphs: list[fx.GraphModule]) -> None:
    x = torch.randn(2, 3, 9, 9)
    model = settle(Net(), x)
    before = copy.deepcopy(model)
    optimized = optimize(model, x)
    for (name, now), then in zip(model.state_dict().items(), before.state_dict().values(), strict=True):
        assert torch.equal(now, then), name
        assert now.stride() == then.stride(), name
    assert all(parameter.requires_grad for parameter in model.parameters())
    with torch.no_grad():
        for value in model.state_dict().values():
            value.add_(1)
    assert_same(optimized, before, x)
    assert_same(optimized, before, torch.randn(3, 3, 7, 8))  # another graph, made after the change


def test_evaluation_mode_only(graphs: list[fx.GraphModule]) -> None:
    x = torch.randn(2, 3, 9, 9)
    model = settle(Net(), x)
    optimized = optimize(model, x)
    assert optimized.eval() is optimized
    with pytest.raises(ValueError, match="an optimized model cannot be trained"):
        optimized.train()
    assert not any(module.training for module in optimized.modules())
    model.middle.generator.norm.train()
    with pytest.raises(ValueError, match=r"model must be in evaluation mode .* middle.generator.norm is in training"):
        optimize(model, x)
    with pytest.raises(ValueError, match="the model itself is in training mode"):
        optimize(model.train(), x)


def test_wrong_types() -> None:
    x = torch.randn(2, 3, 9, 9)
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got function"):
        optimize(F.relu, x)
    with pytest.raises(TypeError, match=r"example_input must be a torch\.Tensor, got tuple"):
        optimize(Net().eval(), (2, 3, 9, 9))


class OneKernel(nn.Module):
    """One kernel for all positions, generated from the input's mean."""

    def __init__(self, channels: int, kernel_size: Any, groups: int, stride: Any, dilation: Any) -> None:
        super().__init__()
        self.shape, self.stride = (groups, *kernel_size), stride
        self.make = nn.Linear(channels, groups * 9)

    def forward(self, x: Tensor) -> Tensor:
        made = self.make(x.mean((2, 3))).view(-1, *self.shape, 1, 1)
        sizes = [-(-size // step) for size, step in zip(x.shape[2:], self.stride, strict=True)]
        return made.expand(-1, *self.shape, *sizes)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"norm_layer": lambda width: nn.GroupNorm(2, width)}, "norm is not a batch norm"),
        ({"norm_layer": lambda width: nn.BatchNorm2d(width, track_running_stats=False)}, "norm is not a batch norm"),
        ({"act_layer": nn.GELU}, "activation is not ReLU"),
        ({"kernel_generator": OneKernel}, "a generator other than the default one"),
    ],
)
def test_other_generators_run_and_are_reported(
    graphs: list[fx.GraphModule], options: dict[str, Any], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    x = torch.randn(2, 3, 9, 10)
    model = settle(Net(stride=2, **options), x)
    optimized = optimize(model, x)
    assert_same(optimized, model, x)
    assert_same(optimized, model, torch.randn(3, 3, 12, 7))
    (reported,) = optimized.unfused  # once for all graphs
    assert reported.startswith("middle ")
    assert reason in reported
    assert reported in caplog.text
    assert calls(graphs, BOTTLENECK) == []


def test_reasons_name_layers_as_named_modules_does(graphs: list[fx.GraphModule]) -> None:
    x = torch.randn(2, 3, 16, 16)
    model = settle(timm.create_model("rednet14_cifar", generator_norm_layer="groupnorm1"), x)
    optimized = optimize(model, x)
    assert_same(optimized, model, x)
    layers = [name for name, module in model.named_modules() if isinstance(module, Involution2d)]
    assert [reason.partition(" ")[0] for reason in optimized.unfused] == layers


class UsedTwice(Net):
    def bottleneck(self, x: Tensor) -> Tensor:
        y = self.middle(x)
        return self.act(self.middle_norm(y)) + y.sigmoid()

    def finish(self, y: Tensor) -> Tensor:
        return y


class NormUsedTwice(UsedTwice):
    def bottleneck(self, x: Tensor) -> Tensor:
        y = self.middle_norm(self.middle(x))
        return torch.relu(y) - y


class NoNorm(UsedTwice):
    def bottleneck(self, x: Tensor) -> Tensor:
        return self.act(self.middle(x))


class NoActivation(UsedTwice):
    def bottleneck(self, x: Tensor) -> Tensor:
        return self.middle_norm(self.middle(x))


class Bare(UsedTwice):
    def bottleneck(self, x: Tensor) -> Tensor:
        return self.middle(x)


@pytest.mark.parametrize(
    ("net", "reason"),
    [(UsedTwice, "no batch norm"), (NormUsedTwice, "no batch norm"), (NoNorm, "no batch norm"),
     (NoActivation, "no ReLU"), (Bare, "no batch norm")],
)  # fmt: skip
def test_a_layer_without_its_neighbours(graphs: list[fx.GraphModule], net: type[Net], reason: str) -> None:
    x = torch.randn(2, 3, 9, 10)
    model = settle(net(stride=2), x)
    optimized = optimize(model, x)
    assert_same(optimized, model, x)
    (reported,) = optimized.unfused
    assert reported.startswith("middle is fused with its reduction only")
    assert reason in reported
    (call,) = calls(graphs, BOTTLENECK)  # with its reduction nevertheless
    assert not call["relu"]
    assert call["scale"] is None


class NoShortcut(Net):
    def bottleneck(self, x: Tensor) -> Tensor:
        return self.act(self.end_norm(self.end(self.act(self.middle_norm(self.middle(x))))))


class BroadcastShortcut(Net):
    def bottleneck(self, x: Tensor) -> Tensor:
        y = self.end_norm(self.end(self.act(self.middle_norm(self.middle(x)))))
        return self.act(y + self.shortcut(x).mean((2, 3), keepdim=True))


class WeightedShortcut(Net):
    def bottleneck(self, x: Tensor) -> Tensor:
        y = self.end_norm(self.end(self.act(self.middle_norm(self.middle(x)))))
        return self.act(torch.add(y, self.shortcut(x), alpha=0.5))


class NoLastActivation(Net):
    def bottleneck(self, x: Tensor) -> Tensor:
        return self.end_norm(self.end(self.act(self.middle_norm(self.middle(x))))) + self.shortcut(x)


class MiddleUsedTwice(Net):
    def bottleneck(self, x: Tensor) -> Tensor:
        y = self.act(self.middle_norm(self.middle(x)))
        return self.act(self.end_norm(self.end(y)) + self.shortcut(y.flip(2)[:, :, :: self.middle.stride[0]]))


class SumsItself(Net):
    def bottleneck(self, x: Tensor) -> Tensor:
        y = self.end_norm(self.end(self.act(self.middle_norm(self.middle(x)))))
        return self.act(y + y)


@pytest.mark.parametrize("net", [NoShortcut, BroadcastShortcut, WeightedShortcut, NoLastActivation, SumsItself])
def test_a_layer_outside_a_bottleneck(graphs: list[fx.GraphModule], net: type[Net]) -> None:
    """Fused with its reduction, norm and ReLU, but not with the convolution after those."""
    x = torch.randn(2, 3, 9, 10)
    model = settle(net(), x)
    optimized = optimize(model, x)
    assert_same(optimized, model, x)
    (call,) = calls(graphs, BOTTLENECK)
    assert call["relu"]
    assert call["scale"] is not None
    assert call["expand_weight"] is None


class OutputUsedTwice(Net):
    def finish(self, y: Tensor) -> Tensor:
        return super().finish(y) + y.mean(1, keepdim=True)


class ShortcutIsTheInput(Net):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.end, self.end_norm = nn.Conv2d(32, 32, 1), nn.BatchNorm2d(32, affine=False)
        self.shortcut, self.after = nn.Identity(), nn.Conv2d(32, 8, 1)


class ShortcutFirst(Net):
    def bottleneck(self, x: Tensor) -> Tensor:
        shortcut = self.shortcut(x)
        y = self.end_norm(self.end(self.act(self.middle_norm(self.middle(x)))))
        shortcut += y
        return F.relu_(shortcut)


class TwiceTheSame(ShortcutIsTheInput):
    """One block, applied twice."""

    def bottleneck(self, x: Tensor) -> Tensor:
        return super().bottleneck(super().bottleneck(x))


class Strided(Net):
    def __init__(self) -> None:
        super().__init__(stride=2)


class Uneven(Net):
    def __init__(self) -> None:
        super().__init__(stride=2)
        self.middle, self.shortcut = Involution2d(32, (3, 5), (1, 2)), nn.Conv2d(32, 24, 1, stride=(1, 2))


class WithoutBiases(Net):
    def __init__(self) -> None:
        super().__init__()
        self.middle.generator.span = nn.Conv2d(8, 18, 1, bias=False)


class WithoutAffine(Net):
    def __init__(self) -> None:
        super().__init__(norm_layer=lambda width: nn.BatchNorm2d(width, affine=False))
        self.middle_norm = nn.BatchNorm2d(32, affine=False, eps=0.1)


FLOATS = [Net, OutputUsedTwice, ShortcutIsTheInput, ShortcutFirst, MiddleUsedTwice, Strided, Uneven, WithoutBiases]
DOUBLES = [WithoutBiases, WithoutAffine]


@pytest.mark.parametrize(
    ("net", "dtype"), [*((net, torch.float32) for net in FLOATS), *((net, torch.float64) for net in DOUBLES)]
)
def test_everything_is_fused(graphs: list[fx.GraphModule], net: type[Net], dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, 9, 10, dtype=dtype)
    model = settle(net().to(dtype), x)
    optimized = optimize(model, x)
    assert_same(optimized, model, x)
    assert_same(optimized, model, torch.randn(3, 3, 12, 7, dtype=dtype))
    assert optimized.unfused == []
    assert torch.ops.involution.fused_layer.default not in [
        node.target for graph in graphs for node in graph.graph.nodes
    ]


def test_one_block_applied_twice(graphs: list[fx.GraphModule]) -> None:
    x = torch.randn(2, 3, 9, 10)
    model = settle(TwiceTheSame(), x)
    assert_same(optimize(model, x), model, x)


def test_the_next_layers_reduction_stays_with_it(graphs: list[fx.GraphModule]) -> None:
    """It matches the beginning of a bottleneck, and is the first reader of the output."""
    x = torch.randn(2, 3, 9, 10)
    optimized = optimize(settle(TwiceTheSame(), x), x)
    assert optimized.unfused == []
    assert len(calls(graphs, BOTTLENECK)) == 2


def test_half_precision_runs_unfused_with_a_reason(graphs: list[fx.GraphModule]) -> None:
    x = torch.randn(2, 3, 9, 10)
    model = settle(Net(), x)
    with torch.no_grad():
        want = model(x)
    optimized = optimize(copy.deepcopy(model).bfloat16(), x.bfloat16())
    got = optimized(x.bfloat16())
    assert got.dtype == torch.bfloat16
    assert (got.float() - want).norm() <= 0.05 * want.norm()
    (reported,) = optimized.unfused
    assert reported.startswith("middle ")
    assert "a generator other than the default one" not in reported


def test_reasons_distinguish_backend_hooks_and_generator(
    graphs: list[fx.GraphModule], monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(2, 3, 9, 10)
    model = settle(Net(), x)
    with monkeypatch.context() as patch:
        patch.setattr(selection, "forced", "reference")
        (reported,) = optimize(model, x).unfused
    assert (
        reported == "middle runs unfused: no kernel of the fused layer serves: INVOLUTION_BACKEND=reference forbids it"
    )
    model.middle.generator.span.register_forward_hook(lambda *_: None)
    (reported,) = optimize(model, x).unfused
    assert "with hooks" in reported


def test_the_state_holds_every_weight_once(graphs: list[fx.GraphModule]) -> None:
    x = torch.randn(2, 3, 9, 10)
    model = settle(Net(), x)
    state = optimize(model, x).state_dict()
    assert list(state) == [f"model.{name}" for name in model.state_dict()]


def test_under_autocast(graphs: list[fx.GraphModule]) -> None:
    x = torch.randn(2, 3, 9, 10)
    model = settle(Net(), x)
    optimized = optimize(model, x)
    with torch.no_grad():
        want = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        got = optimized(x)
    assert (got.float() - want).norm() <= 0.05 * want.norm()


@pytest.mark.parametrize("dims", [1, 3])
@pytest.mark.parametrize("stride", [1, 2])
def test_other_dimensions(graphs: list[fx.GraphModule], dims: int, stride: int) -> None:
    x = torch.randn(2, 3, *(9, 6, 7)[:dims])
    model = settle(Net(dims, stride), x)
    optimized = optimize(model, x)
    assert_same(optimized, model, x)
    assert optimized.unfused == []
    assert calls(graphs, BOTTLENECK)[0]["next_reduce_weight"] is not None


class ChangesItsInput(Net):
    """In place, after the layer reads it and before its ReLU."""

    def bottleneck(self, x: Tensor) -> Tensor:
        y = self.middle_norm(self.middle(x))
        x.mul_(-2)
        return self.act(self.end_norm(self.end(self.act(y))) + self.shortcut(x))


class ChangesItsOutput(Net):
    """In place, before the next layer reads it."""

    def finish(self, y: Tensor) -> Tensor:
        y.mul_(-2)
        return super().finish(y)


class ReturnsTheOverwritten(Net):
    """Returns the shortcut, which the sum overwrites."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.begin(x)
        shortcut = self.shortcut(x)
        y = self.end_norm(self.end(self.act(self.middle_norm(self.middle(x)))))
        total = shortcut.add_(y)
        return F.relu(total), shortcut


@pytest.mark.parametrize("net", [ChangesItsInput, ChangesItsOutput, ReturnsTheOverwritten])
def test_in_place_changes_keep_their_order(graphs: list[fx.GraphModule], net: type[Net]) -> None:
    x = torch.randn(2, 3, 9, 10)
    model = settle(net(), x)
    assert_same(optimize(model, x), model, x)


class Tuple(Net):
    def forward(self, x: Tensor, negated: bool = False) -> tuple[Tensor, Tensor]:
        y = self.bottleneck(self.begin(x))
        z = self.finish(y)
        return (-y if negated else y), z


class Dictionary(Net):
    def forward(self, x: Tensor) -> dict[str, Any]:
        x = self.begin(x)
        y = self.bottleneck(x)
        return {"begin": x, "rest": [y, self.finish(y)]}


def test_tuples_dictionaries_and_options(graphs: list[fx.GraphModule]) -> None:
    x = torch.randn(2, 3, 9, 10)
    for net in (Tuple, Dictionary):
        model = settle(net(), x)
        assert_same(optimize(model, x), model, x)
    model = settle(Tuple(), x)
    assert_same(optimize(model, x), model, x, negated=True)


def test_feature_levels(graphs: list[fx.GraphModule]) -> None:
    x = torch.randn(2, 3, 32, 32)
    model = settle(timm.create_model("rednet14_cifar", features_only=True, out_indices=(0, 1, 3)), x)
    optimized = optimize(model, x)
    assert_same(optimized, model, x)
    assert len(optimized(x)) == 3
    assert optimized.unfused == []
    assert len(calls(graphs, BOTTLENECK)) == 4


class OverwritesByPosition(nn.Module):
    """`inplace` is F.relu's second argument."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.layer = nn.Conv2d(16, 16, 1), involution.Involution2d(16)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        F.relu(y, True)
        return self.layer(y)


class ReluByKeyword(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(input=x)


class Promotes(nn.Module):
    """A shortcut of another dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = involution.Involution2d(16), nn.BatchNorm2d(16)
        self.end, self.end_norm = nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.end_norm(self.end(F.relu(self.norm(self.layer(x))))) + x.double())


@pytest.mark.parametrize(
    "make",
    [OverwritesByPosition, lambda: involution.Involution2d(16, act_layer=ReluByKeyword), Promotes],
    ids=["overwrites by position", "relu by keyword", "promotes"],
)
def test_calls_in_other_forms(graphs: list[fx.GraphModule], make: Callable[[], nn.Module]) -> None:
    x = torch.randn(2, 16, 9, 9)
    model = make().eval()
    torch.testing.assert_close(involution.optimize(model, x)(x), model(x), rtol=1e-4, atol=1e-5)


def out_is_shared(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    first, buffer = x + 1, y + 1
    read = buffer * 2
    return torch.mul(first, 3, out=buffer), read


def out_is_not_shared(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    buffer = y + 1
    return torch.mul(x, 3, out=buffer), x * 2


def first_of_two_outs_is_shared(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    buffer, indices = x + 1, torch.argsort(y)
    read = buffer * 2
    return torch.sort(y, out=(buffer, indices))[1], read


def relu_by_keyword(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    z = x + y
    return F.relu(input=z, inplace=True), z * 2


def in_place_by_keyword(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    z = x + y
    return torch.relu_(input=z), z * 2


def in_place_of_a_single_use(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return torch.relu_(input=x + y), y * 2


@pytest.mark.parametrize(
    ("function", "shared"),
    [
        (out_is_shared, True),
        (out_is_not_shared, False),
        (first_of_two_outs_is_shared, True),
        (relu_by_keyword, True),
        (in_place_by_keyword, True),
        (in_place_of_a_single_use, False),
    ],
)
def test_in_place_calls_are_judged_by_the_tensor_that_they_modify(
    function: Callable[..., tuple[Tensor, Tensor]], shared: bool
) -> None:
    class Calls(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            return function(x, y)

    assert mutates_shared_tensor(fx.symbolic_trace(Calls())) == shared


def test_a_weight_flattened_by_keyword_keeps_its_other_axes() -> None:
    class Flattened(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 3, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight.flatten(start_dim=1))

    graph = fx.symbolic_trace(Flattened())
    (node,) = [node for node in graph.graph.nodes if node.target == "flatten"]
    value = constant(graph, node)
    assert value is not None
    assert value.shape == (4, 3)


class ComputedAffine(nn.BatchNorm2d):
    """A batch norm whose weight and bias depend on the input."""

    def forward(self, input: Tensor) -> Tensor:
        scale = 1 + input.mean((0, 2, 3)).sigmoid()
        return F.batch_norm(input, self.running_mean, self.running_var, scale, scale - 3, False, 0.0, self.eps)


class ComputedNorm(Net):
    def __init__(self) -> None:
        super().__init__()
        self.middle_norm = ComputedAffine(32)


@pytest.mark.parametrize("in_generator", [False, True])
def test_a_norm_whose_weights_are_computed_is_not_folded(graphs: list[fx.GraphModule], in_generator: bool) -> None:
    x = torch.randn(2, 3, 9, 10)
    model = settle(Net(norm_layer=ComputedAffine) if in_generator else ComputedNorm(), x)
    optimized = optimize(model, x)
    assert_same(optimized, model, x)
    (reported,) = optimized.unfused
    assert "batch norm in evaluation mode" in reported


@pytest.mark.parametrize("eps", [0.0, 1e-3])
def test_an_l2_norm_after_a_batch_norm(graphs: list[fx.GraphModule], eps: float) -> None:
    """The fused layer has no norm where rms_eps is 0."""
    x = torch.randn(2, 3, 9, 10)
    model = settle(Net(norm_layer=lambda width: nn.Sequential(nn.BatchNorm2d(width), ChannelL2Norm(eps))), x)
    optimized = optimize(model, x)
    assert_same(optimized, model, x)
    if eps:
        assert optimized.unfused == []
        assert [call["rms_eps"] for call in calls(graphs, BOTTLENECK)] == [eps]
    else:
        (reported,) = optimized.unfused
        assert reported.startswith("middle is not fused with adjacent layers: its generator's norm over channels has")


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (1, 1, 1), (2, 1, 7)])
def test_an_image_smaller_than_the_stride(graphs: list[fx.GraphModule], size: tuple[int, ...]) -> None:
    """Pooling windows of 3d layers are clipped to the image."""
    x = torch.randn(2, 3, *size)
    model = settle(Net(len(size), stride=3), torch.randn(8, 3, *[9] * len(size)))
    optimized = optimize(model, x)
    assert_same(optimized, model, x)
    assert optimized.unfused == []
    assert len(calls(graphs, BOTTLENECK)) == 1


def test_an_unused_layer_after_a_fused_one() -> None:
    """Replacing the first one removes what it no longer needs, while the second one is still to come."""

    class Unused(Net):
        def __init__(self) -> None:
            super().__init__()
            self.unused = Involution2d(24, group_channels=8)

        def bottleneck(self, x: Tensor) -> Tensor:
            y = super().bottleneck(x)
            self.unused(y)
            return y

    x = torch.randn(2, 3, 9, 10)
    model = settle(Unused(), x)
    graph = capture(model, x)
    assert [node.target for node in graph.graph.nodes].count(torch.ops.involution.fused_layer.default) == 2
    assert fuse(graph) == []
    assert len(calls([graph], BOTTLENECK)) == 1
    with torch.no_grad():
        torch.testing.assert_close(graph(x)[0], model(x), rtol=1e-4, atol=1e-4)
