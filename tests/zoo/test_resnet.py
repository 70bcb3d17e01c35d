"""RedNet's convolutional counterparts: the paper's counts, and the small ones' agreement with RedNet."""

import pytest
import timm
import torch
from timm.models.resnet import ResNet
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import involution.zoo  # noqa: F401  (registers the models)

PAPER = {"resnet26_paper": (1, 2, 4, 1), "resnet38_paper": (2, 3, 5, 2)}
SMALL = {"resnet14_cifar": (1, 1, 1, 1), "resnet26_cifar": (1, 2, 4, 1)}
MODELS = [*PAPER, *SMALL]


def stages(model: nn.Module) -> list[nn.Sequential]:
    return [model.get_submodule(f"layer{index}") for index in (1, 2, 3, 4)]  # type: ignore[misc]


def test_all_models_are_registered_beside_timms_own() -> None:
    assert set(MODELS) <= set(timm.list_models("resnet*", module="resnet"))
    # timm's resnet26 is a different network, and our import does not replace it.
    assert [len(stage) for stage in stages(timm.create_model("resnet26", device="meta"))] == [2, 2, 2, 2]


@pytest.mark.parametrize("name", MODELS)
def test_pretrained_raises_timms_error(name: str) -> None:
    with pytest.raises(RuntimeError, match="No pretrained weights exist"):
        timm.create_model(name, pretrained=True)


@pytest.mark.parametrize(
    ("name", "millions", "multiply_adds"),
    [
        ("resnet26_paper", 13.697, 2.342),
        ("resnet38_paper", 19.627, 3.216),
        ("resnet50", 25.557, 4.089),
        ("resnet101", 44.549, 7.801),
        ("resnet152", 60.193, 11.514),
    ],
)
def test_counts_are_the_published_ones(name: str, millions: float, multiply_adds: float) -> None:
    model = timm.create_model(name, device="meta").eval()
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 3) == millions
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, 224, 224, device="meta"))
    assert round(counter.get_total_flops() / 2e9, 3) == multiply_adds


@pytest.mark.parametrize("name", MODELS)
def test_default_cfg_describes_the_model(name: str) -> None:
    model = timm.create_model(name, device="meta").eval()
    cfg, state = model.default_cfg, model.state_dict()
    assert cfg["architecture"] == name
    assert state[cfg["classifier"] + ".weight"].shape[0] == cfg["num_classes"]
    assert cfg["first_conv"] + ".weight" == next(iter(state))
    x = torch.empty(2, *cfg["input_size"], device="meta")
    assert model(x).shape == (2, cfg["num_classes"])
    assert model.forward_features(x).shape == (2, model.num_features, *cfg["pool_size"])
    assert [len(stage) for stage in stages(model)] == list((PAPER | SMALL)[name])


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_gets_a_gradient(name: str) -> None:
    model = timm.create_model(name, num_classes=42, zero_init_last=False).train()
    side = 32 if name in SMALL else 64
    y = model(torch.randn(2, 3, side, side))
    assert y.shape == (2, 42)
    (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    for parameter, value in model.named_parameters():
        assert value.grad is not None, parameter
        assert value.grad.isfinite().all(), parameter
        assert value.grad.any(), f"{parameter} has a gradient of zeros"


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("options", [{}, {"layers": (1, 1, 2, 1), "channels": (16, 16, 32, 48)}, {"output_stride": 8}])
def test_small_ones_have_the_feature_levels_of_their_rednet(name: str, options: dict[str, object]) -> None:
    x = torch.randn(2, 3, 32, 32)
    twins = [timm.create_model(n, features_only=True, **options).eval() for n in (name, name.replace("res", "red"))]
    assert twins[0].feature_info.channels() == twins[1].feature_info.channels()
    assert twins[0].feature_info.reduction() == twins[1].feature_info.reduction()
    shapes = [[level.shape for level in twin(x)] for twin in twins]
    assert shapes[0] == shapes[1]
    assert [x.shape[2] // shape[2] for shape in shapes[0]] == twins[0].feature_info.reduction()


def test_small_ones_differ_from_their_rednet_only_in_stem_and_operator() -> None:
    twin, rednet = (timm.create_model(name, device="meta") for name in ("resnet26_cifar", "rednet26_cifar"))
    assert isinstance(twin, ResNet)

    def shared(model: nn.Module) -> dict[str, torch.Size]:
        named = {name: value.shape for name, value in model.state_dict().items()}
        return {name: shape for name, shape in named.items() if name[:5] in ("layer", "fc.we") and "conv2" not in name}

    assert shared(twin) == shared(rednet)
    convolutions = [block.conv2 for stage in stages(twin) for block in stage]
    assert all(isinstance(conv, nn.Conv2d) and conv.kernel_size == (3, 3) for conv in convolutions)


def test_the_small_stem() -> None:
    model = timm.create_model("resnet14_cifar", in_chans=1, dtype=torch.float64)
    assert model.conv1.weight.shape == (32, 1, 3, 3)
    assert model.conv1.weight.dtype == torch.float64
    assert model.conv1.weight.std().item() == pytest.approx((2 / (32 * 9)) ** 0.5, rel=0.2)  # Kaiming, fan out
    assert model(torch.randn(2, 1, 32, 32).double()).shape == (2, 10)
    assert not any(block.bn3.weight.any() for stage in stages(model) for block in stage)
    kept = timm.create_model("resnet14_cifar", zero_init_last=False)
    assert all((block.bn3.weight == 1).all() for stage in stages(kept) for block in stage)
    with pytest.raises(ValueError, match=r"output_stride must be one of \(8, 16, 32\), got 4"):
        timm.create_model("resnet14_cifar", output_stride=4)
    with pytest.raises(ValueError, match=r"output_stride must be one of \(16, 32\), got 8"):
        timm.create_model("resnet14_cifar", output_stride=8, stem_stride=2)
    with pytest.raises(ValueError, match=r"stem_stride must be 1 or 2, got 4"):
        timm.create_model("resnet14_cifar", stem_stride=4)


def test_a_stem_of_stride_two_halves_every_level() -> None:
    twins = [timm.create_model(f"{kind}14_cifar", features_only=True, stem_stride=2) for kind in ("resnet", "rednet")]
    shapes = [[level.shape[2:] for level in twin.eval()(torch.randn(1, 3, 32, 32))] for twin in twins]
    assert shapes[0] == shapes[1]
    for twin in twins:
        assert [32 // shape[0] for shape in shapes[0]] == twin.feature_info.reduction() == [2, 2, 4, 8, 16]
