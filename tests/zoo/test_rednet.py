"""RedNet through the sweep that timm's own models pass, and against the paper's published counts.

An untrained RedNet says little: its blocks start as their shortcuts, its kernels as the identity, and its running
statistics do not fit. `settled` therefore gives every block a share of the output, every kernel its random weights, and
the norms statistics of the test's own images.
"""

import hashlib
import math
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models import FeatureListNet, group_parameters
from timm.models._features_fx import FeatureGraphNet, create_feature_extractor, get_graph_node_names
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from involution.nn import (
    BottleneckGenerator,
    ContextGenerator,
    Involution2d,
    LinearGenerator,
    PositionGenerator,
    SoftmaxGenerator,
)
from involution.zoo import RedNet

DEPTHS = {
    "rednet26": (1, 2, 4, 1),
    "rednet38": (2, 3, 5, 2),
    "rednet50": (3, 4, 6, 3),
    "rednet101": (3, 4, 23, 3),
    "rednet152": (3, 8, 36, 3),
    "rednet14_cifar": (1, 1, 1, 1),
    "rednet26_cifar": (1, 2, 4, 1),
    "rednetv2_14_cifar": (1, 1, 1, 1),
    "rednetv2_26": (1, 2, 4, 1),
}
MODELS = list(DEPTHS)
PAPER = MODELS[:5]
V2 = [f"rednetv2_{depth}" for depth in ("26", "38", "50", "101", "152", "14_cifar", "26_cifar")]
SMALL = ["rednet14_cifar", "rednet26", "rednetv2_14_cifar"]  # both kinds of stem, and of generator
# Of the paper's repository, re-derived: parameters (3x3 stem), in millions (7x7 stem), multiply-adds in 1e9 (3x3 stem).
PARAMETERS = dict(zip(PAPER, (9_233_166, 12_386_986, 15_540_806, 25_652_950, 33_984_582), strict=True))
MILLIONS_7X7 = dict(zip(PAPER, (9.2339, 12.3877, 15.5415, 25.6537, 33.9853), strict=True))
MULTIPLY_ADDS = dict(zip(PAPER, (1.685, 2.167, 2.649, 4.659, 6.679), strict=True))


def images(name: str, batch: int = 2, size: tuple[int, int] | None = None, channels: int = 3) -> Tensor:
    """Images of 32x32 for the small networks, 64x64 for the others."""
    side = 32 if name.endswith("cifar") else 64
    return torch.randn(batch, channels, *(size or (side, side)))


def create(name: str, **kwargs: Any) -> Any:
    return timm.create_model(name, **kwargs)


def settle(model: nn.Module, x: Tensor) -> Any:
    """Gives every block an effect, fits the norms' statistics to `x`, and returns the model in eval mode."""
    for module in model.modules():
        if isinstance(module, BottleneckGenerator):
            nn.init.kaiming_normal_(module.span.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(module.span.bias)
    norms = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)]
    for name, norm in norms:
        nn.init.uniform_(norm.weight, *((0.1, 0.3) if name.endswith("bn3") and "layer" in name else (0.8, 1.2)))
        nn.init.normal_(norm.bias, std=0.1)
        norm.momentum = 1.0  # the statistics of one batch, at once
    model.train()
    with torch.no_grad():
        model(x)
    for _, norm in norms:
        norm.momentum = 0.1
    return model.eval()


def settled(name: str, x: Tensor, **kwargs: Any) -> Any:
    return settle(create(name, **kwargs), x)


def relative_error(got: Tensor, wanted: Tensor) -> float:
    return float((got.float() - wanted.float()).norm() / wanted.float().norm())


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The gradients of a random projection of the outputs (after norms, a plain mean has none)."""
    model.zero_grad()
    y = model(x)
    y = next(iter(y.values())) if isinstance(y, dict) else y
    (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# --- registration, counts, configuration -----------------------------------------------------------------------------


def test_all_models_are_registered() -> None:
    assert sorted(timm.list_models("rednet*", module="rednet")) == sorted({*MODELS, *V2})


@pytest.mark.parametrize("name", sorted({*MODELS, *V2} - {*PAPER}))
def test_where_there_are_no_weights_timm_says_so(name: str) -> None:
    with pytest.raises(RuntimeError, match="No pretrained weights exist"):
        create(name, pretrained=True)


@pytest.mark.parametrize("name", PAPER)
def test_parameter_counts_are_the_published_ones(name: str) -> None:
    counts = {
        size: sum(p.numel() for p in create(name, stem_kernel_size=size, device="meta").parameters()) for size in (3, 7)
    }
    assert counts[3] == PARAMETERS[name]
    assert round(counts[7] / 1e6, 4) == MILLIONS_7X7[name]


@pytest.mark.parametrize("name", PAPER)
def test_multiply_adds_are_the_published_ones(name: str) -> None:
    model = create(name, device="meta").eval()
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, 224, 224, device="meta"))
    assert round(counter.get_total_flops() / 2e9, 3) == MULTIPLY_ADDS[name]


@pytest.mark.parametrize("name", MODELS)
def test_default_cfg_describes_the_model(name: str) -> None:
    model = create(name, device="meta").eval()
    cfg, state = model.default_cfg, model.state_dict()
    assert cfg["architecture"] == name
    assert model.num_classes == cfg["num_classes"] == state[cfg["classifier"] + ".weight"].shape[0]
    assert cfg["classifier"] == model.get_classifier(name_only=True)
    assert cfg["first_conv"] + ".weight" == next(iter(state))
    assert state[cfg["first_conv"] + ".weight"].shape[1] == cfg["input_size"][0]

    x = torch.empty(2, *cfg["input_size"], device="meta")
    unpooled = (2, model.num_features, *cfg["pool_size"])
    assert model.forward_features(x).shape == unpooled
    model.reset_classifier(0)
    assert model(x).shape == (2, model.num_features)
    model.reset_classifier(0, "")
    assert model(x).shape == unpooled
    assert create(name, num_classes=0, device="meta")(x).shape == (2, model.num_features)
    assert create(name, num_classes=0, global_pool="", device="meta")(x).shape == unpooled


# --- forward and backward --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_a_new_model_runs_at_its_default_size(name: str) -> None:
    model = create(name).eval()
    with torch.no_grad():
        y = model(torch.randn(2, *model.default_cfg["input_size"]))
    assert y.shape == (2, model.num_classes)
    assert y.isfinite().all()
    assert not torch.equal(y[0], y[1])


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_gets_a_gradient(name: str) -> None:
    model = create(name, num_classes=42, zero_init_last=False, kernel_init="paper").train()  # the span is not zero
    found = gradients(model, images(name))
    assert found.keys() == dict(model.named_parameters()).keys()
    for parameter, gradient in found.items():
        assert gradient.isfinite().all(), parameter
        assert gradient.any(), f"{parameter} has a gradient of zeros"


def _norm(state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    weight, bias, mean, var = (state[f"{name}.{part}"] for part in ("weight", "bias", "running_mean", "running_var"))
    return F.batch_norm(x, mean, var, weight, bias)


def _involution(state: dict[str, Tensor], name: str, x: Tensor, stride: int) -> Tensor:
    """The layer by unfold, at sizes that the stride divides."""
    pooled = F.avg_pool2d(x, stride) if stride > 1 else x
    hidden = F.conv2d(pooled, state[f"{name}.generator.reduce.weight"])
    if f"{name}.generator.norm.weight" in state:
        hidden = _norm(state, f"{name}.generator.norm", hidden).relu()
    else:
        hidden = (hidden / (hidden.square().sum(1, keepdim=True) + 1e-6 * hidden.shape[1]).sqrt()).relu()
    kernels = F.conv2d(hidden, state[f"{name}.generator.span.weight"], state[f"{name}.generator.span.bias"])
    n, c, h, w = x.shape[0], x.shape[1], *kernels.shape[2:]
    size = math.isqrt(kernels.shape[1] // (c // 16))
    windows = F.unfold(x, size, padding=size // 2, stride=stride).view(n, c // 16, 16, size * size, h, w)
    return (windows * kernels.view(n, c // 16, 1, size * size, h, w)).sum(3).view(n, c, h, w)


def _written_out(state: dict[str, Tensor], depths: tuple[int, ...], x: Tensor, stem_stride: int) -> Tensor:
    """RedNet as the paper describes it, in one function."""
    x = F.conv2d(x, state["stem.conv1.weight"], stride=min(stem_stride, 2), padding=1)
    x = _norm(state, "stem.bn1", x).relu()
    x = _norm(state, "stem.bn2", _involution(state, "stem.conv2", x, 1)).relu()
    x = _norm(state, "stem.bn3", F.conv2d(x, state["stem.conv3.weight"], padding=1)).relu()
    x = F.max_pool2d(x, 3, 2, 1) if stem_stride == 4 else x
    for stage, depth in enumerate(depths, start=1):
        for block in range(depth):
            name, stride = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
            branch = _norm(state, f"{name}.bn1", F.conv2d(x, state[f"{name}.conv1.weight"])).relu()
            branch = _norm(state, f"{name}.bn2", _involution(state, f"{name}.conv2", branch, stride)).relu()
            branch = _norm(state, f"{name}.bn3", F.conv2d(branch, state[f"{name}.conv3.weight"]))
            if block == 0:
                x = _norm(
                    state, f"{name}.downsample.1", F.conv2d(x, state[f"{name}.downsample.0.weight"], stride=stride)
                )
            x = (x + branch).relu()
    return F.linear(x.mean((2, 3)), state["fc.weight"], state["fc.bias"])


@pytest.mark.parametrize("name", SMALL)
def test_equals_the_network_as_one_function(name: str) -> None:
    x = images(name).double()
    model = settled(name, x, dtype=torch.float64)
    with torch.no_grad():
        written_out = _written_out(model.state_dict(), DEPTHS[name], x, 1 if name.endswith("cifar") else 4)
        torch.testing.assert_close(model(x), written_out)


def test_blocks_start_as_their_shortcuts() -> None:
    scales = [m.bn3.weight for m in create("rednet26").modules() if hasattr(m, "downsample")]
    assert len(scales) == 8
    assert not any(scale.any() for scale in scales)
    model = create("rednet26", zero_init_last=False)
    assert all((m.bn3.weight == 1).all() for m in model.modules() if hasattr(m, "downsample"))


def test_every_convolution_has_kaiming_initialisation() -> None:
    for name, module in create("rednet26", kernel_init="paper").named_modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.out_channels * math.prod(module.kernel_size)
            assert module.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.2), name
            assert module.bias is None or not module.bias.any()


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("in_chans", [1, 5])
def test_in_chans(name: str, in_chans: int) -> None:
    model = create(name, in_chans=in_chans).eval()
    assert model.in_chans == in_chans
    assert model(images(name, channels=in_chans)).isfinite().all()
    with pytest.raises(RuntimeError, match="channels"):
        model(images(name, channels=3))


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("size", [(75, 97), (33, 32), (1, 5)])
def test_sizes_round_up_at_every_level(name: str, size: tuple[int, int]) -> None:
    model = create(name, features_only=True).eval()
    for level, reduction in zip(model(images(name, size=size)), model.feature_info.reduction(), strict=True):
        assert level.shape[2:] == tuple(math.ceil(side / reduction) for side in size)
        assert level.isfinite().all()


def fingerprint(model: nn.Module) -> str:
    """A hash of the names and bits of its state."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode() + value.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def test_the_papers_initialisation_is_bitwise_stable() -> None:
    """Hashes from the version before there were other initialisations."""
    torch.manual_seed(0)
    assert fingerprint(create("rednet26", kernel_init="paper")) == "c3030db2f42ae953"
    torch.manual_seed(0)
    assert fingerprint(create("rednet14_cifar", zero_init_last=False, kernel_init="paper")) == "ff267703109489b0"
    torch.manual_seed(0)
    layer = Involution2d(64, norm_layer=nn.BatchNorm2d, kernel_init="paper")
    assert fingerprint(layer) == "7012354f58194d84"


def test_initialisations_differ_only_in_the_kernels() -> None:
    states = []
    for start in ("paper", "identity", "box"):
        torch.manual_seed(0)
        states.append(create("rednet14_cifar", kernel_init=start).state_dict())
    differing = {name for name in states[0] if any(not torch.equal(states[0][name], other[name]) for other in states)}
    assert {name.rpartition("generator.")[2] for name in differing} == {"span.weight", "span.bias"}
    identity, box = (state["layer1.0.conv2.generator.span.bias"].view(-1, 7, 7) for state in states[1:])
    assert torch.equal(identity, F.pad(torch.ones(1, 1, 1), [3] * 4))
    assert torch.equal(box, torch.full((1, 7, 7), 1 / 49))


@pytest.mark.parametrize("name", [*MODELS[:-2], *V2])
@pytest.mark.parametrize("zero_init_last", [False, True])
def test_every_new_network_is_finite_in_evaluation(name: str, zero_init_last: bool) -> None:
    model = create(name, zero_init_last=zero_init_last).eval()
    with torch.no_grad():
        once, twice = (model(scale * images(name, batch=1)) for scale in (1.0, 2.0))
    assert once.isfinite().all()
    assert twice.norm() < 10 * once.norm()  # not quadratic in every block


def test_v2_differs_only_in_its_generators() -> None:
    for name in V2:
        paper = create(name.replace("v2_", ""), device="meta")
        ours = create(name, device="meta")
        shapes = [
            {k: v.shape for k, v in model.state_dict().items() if ".generator." not in k} for model in (paper, ours)
        ]
        assert shapes[0] == shapes[1]
        assert sum(p.numel() for p in ours.parameters()) <= sum(p.numel() for p in paper.parameters())
        assert not [n for n, m in ours.named_modules() if "generator" in n and isinstance(m, nn.BatchNorm2d)]


@pytest.mark.parametrize("name", ["rednetv2_26_cifar", "rednetv2_26"])
def test_a_batch_of_one_small_image_trains(name: str) -> None:
    """The last stage of the larger one is one pixel, whose variance batch norm in a generator cannot compute."""
    model, x = create(name, norm_layer="groupnorm1", generator_norm_layer="l2", zero_init_last=False), images(name, 1)
    loss = F.cross_entropy(model.train()(x[..., :32, :32]), torch.tensor([1]))
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_training_lowers_the_loss() -> None:
    model = create("rednet14_cifar").train()
    x, labels = images("rednet14_cifar", batch=16), torch.arange(16) % 10
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for _ in range(15):
        loss = F.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 2.0
    assert losses[-1] < 0.5


# --- head ------------------------------------------------------------------------------------------------------------


def test_forward_is_head_of_features() -> None:
    x = images("rednet26")
    model = settled("rednet26", x)
    with torch.no_grad():
        features = model.forward_features(x)
        pooled = model.forward_head(features, pre_logits=True)
        assert torch.equal(pooled, features.mean((2, 3)))
        assert torch.equal(model(x), model.get_classifier()(pooled))


@pytest.mark.parametrize(("pool", "times"), [("avg", 1), ("max", 1), ("avgmax", 1), ("catavgmax", 2)])
def test_reset_classifier(pool: str, times: int) -> None:
    model = create("rednet14_cifar", dtype=torch.float64).eval()
    model.reset_classifier(7, pool)
    assert model.num_classes == 7
    assert model.head_hidden_size == times * model.num_features
    assert model.global_pool.pool_type == pool
    assert not model.fc.training
    x = images("rednet14_cifar").double()
    assert model(x).shape == (2, 7)
    model.reset_classifier(3)
    assert model.global_pool.pool_type == pool
    assert model(x).shape == (2, 3)
    assert create("rednet14_cifar", global_pool=pool).fc.in_features == times * 512


def test_drop_rate_acts_only_on_the_head_in_training() -> None:
    model = create("rednet14_cifar", drop_rate=0.5, num_classes=0)
    features = torch.ones(1, 512, 4, 4)
    assert set(model.forward_head(features).unique().tolist()) == {0.0, 2.0}
    assert torch.equal(model.eval().forward_head(features), torch.ones(1, 512))


# --- feature levels --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_five_feature_levels(name: str) -> None:
    x = images(name)
    model = settle(create(name, features_only=True), x)
    assert isinstance(model, FeatureListNet)
    small = name.endswith("cifar")
    assert model.feature_info.channels() == ([32, 64, 128, 256, 512] if small else [64, 256, 512, 1024, 2048])
    assert model.feature_info.reduction() == ([1, 1, 2, 4, 8] if small else [2, 4, 8, 16, 32])
    assert model.feature_info.module_name() == ["stem", "layer1", "layer2", "layer3", "layer4"]
    with torch.no_grad():
        levels = model(x)
    shapes = zip(model.feature_info.channels(), model.feature_info.reduction(), strict=True)
    assert [tuple(level.shape) for level in levels] == [(2, c, x.shape[2] // r, x.shape[3] // r) for c, r in shapes]
    assert all(level.isfinite().all() and (level >= 0).all() and level.any() for level in levels)


@pytest.mark.parametrize("out_indices", [(0, 2, 4), (1, 2), (-1,), (-3, -2), 3])
@pytest.mark.parametrize("feature_cls", ["list", "dict", "hook", "fx", "getter"])
def test_out_indices(feature_cls: str, out_indices: tuple[int, ...] | int) -> None:
    x = images("rednet26")
    model = settled("rednet26", x)
    part = create("rednet26", features_only=True, feature_cls=feature_cls, out_indices=out_indices).eval()
    own_names = {"dict": lambda name: name, "list": lambda name: name, "hook": lambda name: f"body.{name}"}
    prefix = own_names.get(feature_cls, lambda name: f"{'graph_module' if feature_cls == 'fx' else 'model'}.{name}")
    weights = {prefix(name): value for name, value in model.state_dict().items()}
    assert not part.load_state_dict(weights, strict=False).missing_keys
    wanted = [2, 3, 4] if out_indices == 3 else [index % 5 for index in out_indices]  # type: ignore[union-attr]
    with torch.no_grad():
        everything = model.forward_intermediates(x, intermediates_only=True)
        levels = part(x)
    levels = list(levels.values()) if feature_cls == "dict" else levels
    assert len(levels) == len(wanted)
    for index, level in zip(wanted, levels, strict=True):
        assert torch.equal(level, everything[index])


@pytest.mark.parametrize(
    ("output_stride", "reductions", "dilations"),
    [
        (8, [2, 4, 8, 8, 8], [{1}, {1}, {1, 2}, {2, 4}]),
        (16, [2, 4, 8, 16, 16], [{1}, {1}, {1}, {1, 2}]),
        (32, [2, 4, 8, 16, 32], [{1}, {1}, {1}, {1}]),
    ],
)
def test_output_stride_dilates(output_stride: int, reductions: list[int], dilations: list[set[int]]) -> None:
    x = images("rednet50")
    model = settled("rednet50", x, output_stride=output_stride)
    assert [info["reduction"] for info in model.feature_info] == reductions
    stages = [model.layer1, model.layer2, model.layer3, model.layer4]
    assert [{block.conv2.dilation[0] for block in stage} for stage in stages] == dilations
    # Without its stride, a stage's first block has the former dilation; the others have the new one.
    for stage, found in zip(stages, dilations, strict=True):
        assert stage[0].conv2.dilation[0] == min(found)
        assert {block.conv2.dilation[0] for block in stage[1:]} == {max(found)}
    with torch.no_grad():
        levels = model.forward_intermediates(x, intermediates_only=True)
    assert [level.shape[2] for level in levels] == [64 // reduction for reduction in reductions]
    assert levels[-1].isfinite().all()
    assert model.state_dict().keys() == create("rednet50", device="meta").state_dict().keys()


def test_forward_intermediates() -> None:
    x = images("rednet26")
    model = settled("rednet26", x)
    with torch.no_grad():
        features, levels = model.forward_intermediates(x)
        assert torch.equal(features, model.forward_features(x))
        assert torch.equal(features, levels[4])
        assert [level.shape[1] for level in levels] == [64, 256, 512, 1024, 2048]
        last, two = model.forward_intermediates(x, indices=2)
        assert torch.equal(last, features)
        assert len(two) == 2
        assert torch.equal(two[0], levels[3])
        stopped, chosen = model.forward_intermediates(x, indices=[2, 0], stop_early=True)
        assert torch.equal(stopped, levels[2])
        assert [level.shape for level in chosen] == [levels[0].shape, levels[2].shape]
        (alone,) = model.forward_intermediates(x, indices=[-4], intermediates_only=True, stop_early=True)
        assert torch.equal(alone, levels[1])


@pytest.mark.parametrize("last", range(5))
@pytest.mark.parametrize("name", SMALL)
def test_prune_intermediate_layers(name: str, last: int) -> None:
    x = images(name)
    model = settled(name, x)
    parameters = sum(p.numel() for p in model.parameters())
    with torch.no_grad():
        wanted = model.forward_intermediates(x, intermediates_only=True)
        assert model.prune_intermediate_layers([0, last - 5]) == [0, last]
        features, levels = model.forward_intermediates(x, [last])
        assert torch.equal(levels[0], wanted[last])
        assert features.shape == model(x).shape == (2, model.num_features, *wanted[last].shape[2:])
    removed = [f"layer{level}" for level in range(last + 1, 5)]
    kept = {parameter.split(".")[0] for parameter, _ in model.named_parameters()}
    assert kept == {"stem", *(f"layer{level}" for level in range(1, last + 1))}
    assert not kept & {*removed, "fc"}
    assert sum(p.numel() for p in model.parameters()) < parameters
    model.set_grad_checkpointing()
    assert model(x).shape[1] == model.feature_info[last]["num_chs"]


def test_prune_can_keep_the_head() -> None:
    model = create("rednet14_cifar")
    assert model.prune_intermediate_layers(2, prune_head=False) == [3, 4]
    assert model(images("rednet14_cifar")).shape == (2, 10)


# --- tracing, compiling, exporting, layouts, dtypes ------------------------------------------------------------------


def _traced(model: nn.Module) -> nn.Module:
    _, eval_nodes = get_graph_node_names(model)
    assert any(node.endswith("conv2") for node in eval_nodes)  # an involution is one node
    return create_feature_extractor(model, [eval_nodes[-1]])


@pytest.mark.parametrize("name", MODELS)
def test_fx_graph_computes_the_same(name: str) -> None:
    x = images(name)
    model = settled(name, x)
    traced = _traced(model).eval()
    with torch.no_grad():
        (y,) = traced(x).values()
        assert torch.equal(y, model(x))


@pytest.mark.parametrize("name", SMALL)
def test_fx_graph_has_the_same_gradients(name: str) -> None:
    x = images(name)
    model = settled(name, x, drop_path_rate=0.0).train()
    wanted = gradients(model, x)
    found = gradients(_traced(model).train(), x)
    assert found.keys() == wanted.keys() == dict(model.named_parameters()).keys()
    for parameter, gradient in wanted.items():
        torch.testing.assert_close(found[parameter], gradient, msg=parameter)


def test_feature_graph_net() -> None:
    x = images("rednet26")
    model = settled("rednet26", x)
    with torch.no_grad():
        for level, wanted in zip(
            FeatureGraphNet(model, (1, 4))(x), model.forward_intermediates(x, [1, 4])[1], strict=True
        ):
            assert torch.equal(level, wanted)


@pytest.mark.parametrize("name", ["rednet26_cifar", "rednet50"])
def test_compiled_into_one_graph(name: str) -> None:
    x = images(name)
    model = settled(name, x)
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert relative_error(compiled(x), model(x)) < 1e-4


@pytest.mark.parametrize("name", ["rednet14_cifar", "rednet26"])
def test_inductor_compiles_either_stem_and_both_kinds_of_block(name: str) -> None:
    x = images(name)
    model = settled(name, x)
    model.prune_intermediate_layers([2])  # the rest has the same kinds of blocks, and takes long to compile
    torch._dynamo.reset()
    with torch.no_grad():
        assert relative_error(torch.compile(model, fullgraph=True)(x), model(x)) < 1e-4


def test_compiled_training_has_the_same_gradients() -> None:
    x = images("rednet14_cifar")
    model = settled("rednet14_cifar", x).train()
    wanted = gradients(model, x)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(x).square().sum().backward()  # overwrites the gradients of `wanted`'s loss
    found = gradients(model, x)
    model.zero_grad()
    y = compiled(x)
    (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    assert found.keys() == wanted.keys()
    for parameter, value in model.named_parameters():
        assert value.grad is not None
        assert relative_error(value.grad, wanted[parameter]) < 1e-3, parameter


@pytest.mark.parametrize("name", ["rednet26_cifar", "rednet50"])
def test_exported_channels_last_and_bfloat16_agree(name: str) -> None:
    x = images(name)
    model = settled(name, x)
    with torch.no_grad():
        wanted = model(x)
        assert relative_error(torch.export.export(model, (x,)).module()(x), wanted) < 1e-5
        with torch.autocast("cpu", torch.bfloat16):
            half = model(x)
        assert half.dtype == torch.bfloat16
        assert relative_error(half, wanted) < 0.3  # each involution doubles relative errors: two factors come from x
        last = model.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
        assert relative_error(last, wanted) < 1e-4


def test_channels_last_reaches_the_features() -> None:
    model = create("rednet26").eval().to(memory_format=torch.channels_last)
    features = model.forward_features(images("rednet26").to(memory_format=torch.channels_last))
    assert features.is_contiguous(memory_format=torch.channels_last)


# --- training features -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SMALL)
def test_grad_checkpointing_has_the_same_gradients(name: str) -> None:
    x = images(name)
    model = settled(name, x).train()
    wanted = gradients(model, x)
    calls = []
    model.layer2[0].register_forward_pre_hook(lambda *_: calls.append(1))
    model.set_grad_checkpointing()
    found = gradients(model, x)
    assert len(calls) == 2  # forward, and once more in the backward pass
    assert found.keys() == wanted.keys()
    for parameter, gradient in wanted.items():
        torch.testing.assert_close(found[parameter], gradient, msg=parameter)
    model.set_grad_checkpointing(False)
    gradients(model, x)
    assert len(calls) == 3


@pytest.mark.parametrize("name", MODELS)
def test_group_matcher_covers_every_parameter(name: str) -> None:
    model = create(name, device="meta")
    for coarse, groups in ((True, 6), (False, sum(DEPTHS[name]) + 2)):
        matched = group_parameters(model, model.group_matcher(coarse=coarse))
        assert sorted(matched) == list(range(groups))
        found = [parameter for group in matched.values() for parameter in group]
        assert sorted(found) == sorted(parameter for parameter, _ in model.named_parameters())
        assert all(parameter.startswith("stem.") for parameter in matched[0])
        assert all(parameter.startswith("layer1.") for parameter in matched[1])
        assert matched[groups - 1] == ["fc.weight", "fc.bias"]


def test_drop_path_grows_linearly_and_acts_only_in_training() -> None:
    x = images("rednet26", batch=8)
    model = settled("rednet26", x, drop_path_rate=0.7)
    blocks = [block for stage in (model.layer1, model.layer2, model.layer3, model.layer4) for block in stage]
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for block in blocks]
    assert rates == pytest.approx([0.1 * index for index in range(8)])
    plain = create("rednet26").eval()
    plain.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(model(x), plain(x))
        block, features = blocks[-1], torch.randn(64, 1024, 4, 4)
        block.bn3.eval()
        block.drop_path.train()
        shortcut = block.downsample(features).relu()
        dropped = [torch.equal(a, b) for a, b in zip(block(features), shortcut, strict=True)]
    assert 30 < sum(dropped) < 60  # about 0.7 of 64


# --- options and errors ----------------------------------------------------------------------------------------------


def test_layers_and_channels_of_the_small_networks_can_be_chosen() -> None:
    model = create("rednet26_cifar", layers=(1, 1, 1, 2), channels=(16, 16, 32, 48), num_classes=5).eval()
    stages = [model.layer1, model.layer2, model.layer3, model.layer4]
    assert [len(stage) for stage in stages] == [1, 1, 1, 2]
    assert [level.shape[1:] for level in model.forward_intermediates(images("x_cifar"), intermediates_only=True)] == [
        (32, 32, 32),
        (64, 32, 32),
        (64, 16, 16),
        (128, 8, 8),
        (192, 4, 4),
    ]
    assert model(images("x_cifar")).shape == (2, 5)


def test_depths_of_the_large_networks_can_be_chosen() -> None:
    model = create("rednet50", layers=(1, 1, 1, 1), device="meta")
    assert [len(stage) for stage in (model.layer1, model.layer2, model.layer3, model.layer4)] == [1, 1, 1, 1]


def test_involution_options_reach_every_involution() -> None:
    model = create("rednet14_cifar", kernel_size=5, group_channels=8, reduction_ratio=2)
    stem, *others = [module for module in model.modules() if isinstance(module, Involution2d)]
    assert len(others) == 4
    assert stem.kernel_size == (3, 3)
    assert all(layer.kernel_size == (5, 5) for layer in others)
    for layer in (stem, *others):
        assert layer.group_channels == 8
        assert layer.generator.reduce.out_channels == layer.channels // 2


def test_contradictory_options() -> None:
    with pytest.raises(ValueError, match="stem_kernel_size must be 3 for a convolution in the stem, got 7"):
        create("rednet14_cifar", stem_layer="convolution", stem_kernel_size=7)
    with pytest.raises(TypeError, match="kernel_generator must make a module for each layer"):
        create("rednet14_cifar", kernel_generator=nn.Identity())


def test_all_channels_can_share_a_kernel() -> None:
    model = create("rednet14_cifar", group_channels="all")
    layers = [module for module in model.modules() if isinstance(module, Involution2d)]
    assert [layer.groups for layer in layers] == [1] * 5
    assert {layer.group_channels for layer in layers} == {16, 32, 64, 128}


def test_generator_and_stem_can_be_chosen() -> None:
    model = create("rednet14_cifar", kernel_generator="linear", stem_layer="convolution")
    assert isinstance(model.stem.conv2, nn.Conv2d)
    layers = [module for module in model.modules() if isinstance(module, Involution2d)]
    assert len(layers) == 4
    assert all(isinstance(layer.generator, LinearGenerator) for layer in layers)
    assert model(images("rednet14_cifar")).shape == (2, 10)
    own = create("rednet14_cifar", kernel_generator=LinearGenerator)
    assert isinstance(own.stem.conv2.generator, LinearGenerator)


@pytest.mark.parametrize(
    ("name", "kind"), [("context", ContextGenerator), ("position", PositionGenerator), ("softmax", SoftmaxGenerator)]
)
def test_every_generator_by_name(name: str, kind: type[nn.Module]) -> None:
    """Bottleneck generators have the network's norm, activation and reduction."""
    given = {"kernel_generator": name, "reduction_ratio": 2, "norm_layer": "groupnorm1", "act_layer": "gelu"}
    model = create("rednet14_cifar", **given)
    generators = [module.generator for module in model.modules() if isinstance(module, Involution2d)]
    assert len(generators) == 5
    assert {type(generator) for generator in generators} == {kind}
    if issubclass(kind, BottleneckGenerator):
        assert {type(generator.norm).__name__ for generator in generators} == {"GroupNorm1"}
        assert {type(generator.act).__name__ for generator in generators} == {"GELU"}
        assert all(2 * generator.reduce.out_channels == generator.reduce.in_channels for generator in generators)
    assert model(images("rednet14_cifar")).shape == (2, 10)


def test_norm_and_activation_layers() -> None:
    model = create("rednet14_cifar", norm_layer="layernorm2d", act_layer="gelu").eval()
    kinds = {type(module).__name__ for module in model.modules()}
    assert "LayerNorm2d" in kinds
    assert "GELU" in kinds
    assert not kinds & {"BatchNorm2d", "ReLU"}
    assert model(images("rednet14_cifar")).isfinite().all()
    mixed = create("rednet14_cifar", norm_layer=nn.SyncBatchNorm, generator_norm_layer="batchnorm2d")
    assert {type(m) for name, m in mixed.named_modules() if name.endswith("generator.norm")} == {nn.BatchNorm2d}
    assert {type(m) for name, m in mixed.named_modules() if name.endswith("bn2")} == {nn.SyncBatchNorm}


def test_device_and_dtype_reach_every_parameter() -> None:
    model = create("rednet14_cifar", device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.bfloat16)}
    model.reset_classifier(4)
    assert (model.fc.weight.device.type, model.fc.weight.dtype) == ("meta", torch.bfloat16)


@pytest.mark.parametrize(
    ("argument", "value", "wanted"),
    [
        ("output_stride", 4, r"output_stride must be one of \(8, 16, 32\), got 4"),
        ("stem_layer", "pool", r"stem_layer must be one of \('involution', 'convolution'\), got 'pool'"),
        (
            "kernel_generator",
            "mlp",
            r"kernel_generator must be one of \('bottleneck', 'linear', .*, 'softmax'\), got 'mlp'",
        ),
        ("kernel_init", "zero", r"kernel_init must be one of \('identity', 'box', 'paper'\), got 'zero'"),
        ("norm_layer", "l2", "norm_layer must be a norm's name in timm or its class, got 'l2'"),
        ("generator_norm_layer", "no", "generator_norm_layer must be a norm's name .*, or \"l2\", got 'no'"),
        ("stem_kernel_size", 4, r"stem_kernel_size must be one of \(3, 7\), got 4"),
        ("stem_stride", 3, r"stem_stride must be one of \(1, 2, 4\), got 3"),
        ("layers", (1, 1, 1), r"layers must be four ints .* got \(1, 1, 1\)"),
        ("layers", (1, 0, 1, 1), r"layers must be four ints .* got \(1, 0, 1, 1\)"),
        ("channels", (16, 32, 64), r"channels must be four ints .* got \(16, 32, 64\)"),
        ("channels", (16, 24, 32, 64), r"group_channels must divide channels, got group_channels=16, channels=24"),
        ("stem_channels", 16, r"group_channels must divide channels, got group_channels=16, channels=8"),
        ("num_classes", -1, "num_classes must be at least 0, got -1"),
        ("in_chans", 0, "in_chans must be at least 1, got 0"),
    ],
)
def test_errors_name_the_argument(argument: str, value: Any, wanted: str) -> None:
    with pytest.raises(ValueError, match=wanted):
        RedNet(**{argument: value}, device="meta")


@pytest.mark.parametrize("indices", [0, 6, [5], [-6], []])
def test_missing_feature_levels(indices: Any) -> None:
    model = create("rednet14_cifar", device="meta")
    x = torch.empty(1, 3, 32, 32, device="meta")
    for call in (lambda: model.forward_intermediates(x, indices), lambda: model.prune_intermediate_layers(indices)):
        with pytest.raises(ValueError, match="indices must be None, an int from 1 to 5, or ints from -5 to 4, got"):
            call()
    with pytest.raises(ValueError, match='output_fmt must be "NCHW"'):
        model.forward_intermediates(x, output_fmt="NHWC")


def test_state_dict_has_the_names_that_checkpoints_map_to() -> None:
    keys = [key for key in create("rednet26", device="meta").state_dict() if "num_batches" not in key]
    norm = ("weight", "bias", "running_mean", "running_var")
    involution = ["generator.reduce.weight", *(f"generator.norm.{n}" for n in norm), "generator.span.weight"]
    involution.append("generator.span.bias")

    def bottleneck(prefix: str) -> list[str]:
        middle = [f"conv2.{name}" for name in involution]
        names = ["conv1.weight", *(f"bn1.{n}" for n in norm), *middle, *(f"bn2.{n}" for n in norm), "conv3.weight"]
        return [f"{prefix}.{name}" for name in (*names, *(f"bn3.{n}" for n in norm))]

    projection = ["layer1.0.downsample.0.weight", *(f"layer1.0.downsample.1.{n}" for n in norm)]
    assert keys[: 2 * len(bottleneck("")) + 5] == [*bottleneck("stem"), *bottleneck("layer1.0"), *projection]
    assert keys[-2:] == ["fc.weight", "fc.bias"]
