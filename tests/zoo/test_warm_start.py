"""load_resnet: RedNets with a ResNet's weights."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn
from torchvision.models import resnet50

from involution.zoo import load_resnet

SMALL = {"num_classes": 5, "channels": (16, 32, 32, 32)}


def filled(name: str, **kwargs: Any) -> nn.Module:
    """A network with non-default running statistics."""
    model: nn.Module = timm.create_model(name, **kwargs)
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 1.5)
    return model


@pytest.mark.parametrize(
    ("ours", "theirs"), [("rednet26_cifar", "resnet26_cifar"), ("rednet38", "resnet38_paper"), ("rednet50", "resnet50")]
)
def test_everything_but_stem_and_involutions(ours: str, theirs: str) -> None:
    model, source = timm.create_model(ours, **SMALL), filled(theirs, **SMALL)
    before = {name: one.clone() for name, one in model.state_dict().items()}
    report = load_resnet(model, source.state_dict())
    weights = source.state_dict()
    copied, after = set(report.copied), model.state_dict()
    assert sorted([*report.copied, *report.new]) == sorted(after)
    for name, one in after.items():
        if name.startswith(("layer", "fc")) and "generator" not in name:
            assert name in copied
            assert torch.equal(one, weights[name]), name
        elif name.startswith("stem.bn3"):
            assert torch.equal(one, weights[name.replace("stem.bn3", "bn1")])
        else:
            assert name in report.new
            assert torch.equal(one, before[name]), name
    assert all("conv2" in name or name == "conv1.weight" for name in report.left_out)
    assert report.parameters[1] == sum(one.numel() for one in model.parameters())
    assert 0.8 < report.parameters[0] / report.parameters[1] < 1


def test_a_deep_stem_and_average_pooling_shortcuts() -> None:
    model, source = timm.create_model("rednet50", **SMALL), filled("resnet50d", **SMALL)
    report = load_resnet(model, source.state_dict())
    ours, theirs = model.state_dict(), source.state_dict()
    for mine, other in {
        "stem.conv1.weight": "conv1.0.weight",
        "stem.bn2.running_var": "conv1.4.running_var",
        "stem.conv3.weight": "conv1.6.weight",
        "stem.bn3.bias": "bn1.bias",
        "layer2.0.downsample.0.weight": "layer2.0.downsample.1.weight",
        "layer2.0.downsample.1.running_mean": "layer2.0.downsample.2.running_mean",
    }.items():
        assert torch.equal(ours[mine], theirs[other]), mine
    assert all("generator" in name for name in report.new)
    convolution = timm.create_model("rednet50", stem_layer="convolution", **SMALL)
    assert "stem.conv2.weight" in load_resnet(convolution, source.state_dict()).copied


def test_torchvisions_weights_fill_a_backbone_from_a_file(tmp_path: Path) -> None:
    source = resnet50(num_classes=3)
    torch.save(source.state_dict(), tmp_path / "resnet50.pth")
    body = timm.create_model("rednet50", features_only=True)
    report = load_resnet(body, tmp_path / "resnet50.pth")
    assert torch.equal(body.layer4[2].conv3.weight, source.layer4[2].conv3.weight)
    assert "layer4.2.conv3.weight" in report.copied
    assert {"fc.weight", "fc.bias", "conv1.weight", "layer4.2.conv2.weight"} <= set(report.left_out)
    assert str(report).splitlines()[0].startswith(f"warm start from {tmp_path / 'resnet50.pth'}: 301 of 449 tensors")
    assert "layer*.*.conv2.generator.span (16)" in str(report)
    assert "left out: conv1, layer*.*.conv2 (16), fc" in str(report)


@pytest.mark.parametrize("prefix", ["net.", "module.", "backbone.body."])
def test_prefixes_and_checkpoints(prefix: str, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    source = timm.create_model("rednet26_cifar", num_classes=7)
    state = {prefix + name: one for name, one in source.state_dict().items()} | {"head.weight": torch.zeros(1)}
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "a.ckpt")
    save_file(state, tmp_path / "a.safetensors")
    for file in ("a.ckpt", "a.safetensors"):
        model = timm.create_model("rednet26_cifar", num_classes=3)
        report = load_resnet(model, str(tmp_path / file))
        assert report.new == ["fc.weight", "fc.bias"]
        assert torch.equal(model.layer1[0].conv2.generator.span.weight, source.layer1[0].conv2.generator.span.weight)


def test_a_name_means_timms_pretrained_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    source, asked = filled("resnet14_cifar"), []

    def create(name: str, **kwargs: Any) -> nn.Module:
        asked.append((name, kwargs))
        torch.rand(1)
        return source

    model = timm.create_model("rednet14_cifar")
    monkeypatch.setattr(timm, "create_model", create)
    state = torch.get_rng_state()
    report = load_resnet(model, "resnet50.a1_in1k")
    assert torch.equal(torch.get_rng_state(), state)
    assert asked == [("resnet50.a1_in1k", {"pretrained": True})]
    assert torch.equal(model.layer1[0].conv1.weight, source.layer1[0].conv1.weight)
    assert report.source == "resnet50.a1_in1k"


def test_a_warm_start_equals_the_resnet_except_for_new_layers() -> None:
    """With the identity instead of every 3x3 convolution and the stem, both networks are equal."""

    class Identity(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    model, source = timm.create_model("rednet26_cifar").eval(), filled("resnet26_cifar").eval()
    load_resnet(model, source.state_dict())
    for network in (model, source):
        for stage in (network.layer1, network.layer2, network.layer3, network.layer4):
            for block in stage:
                block.conv2 = nn.AvgPool2d(1, 2) if block.conv1.in_channels != block.conv3.out_channels else Identity()
        network.layer1[0].conv2 = Identity()
    x = torch.randn(2, 32, 8, 8)
    for name in ("layer1", "layer2", "layer3", "layer4"):
        x = model.get_submodule(name)(x), source.get_submodule(name)(x)
        torch.testing.assert_close(*x)
        x = x[0]


@pytest.mark.parametrize(
    ("model", "source", "error", "message"),
    [
        ("rednet26", "resnet18", ValueError, r"conv1.weight is \[64, 64, 3, 3\] and not \[64, 64, 1, 1\]"),
        ("rednet26", "vit_tiny_patch16_224", ValueError, "which lacks layer1.0.conv1.weight"),
    ],
)
def test_networks_without_bottlenecks(model: str, source: str, error: type[Exception], message: str) -> None:
    network = timm.create_model(model)
    before = {name: one.clone() for name, one in network.state_dict().items()}
    with pytest.raises(error, match=message):
        load_resnet(network, timm.create_model(source).state_dict())
    assert all(torch.equal(one, before[name]) for name, one in network.state_dict().items())


def test_sources_that_cannot_be_read(tmp_path: Path) -> None:
    model = timm.create_model("rednet14_cifar")
    (tmp_path / "text.pt").write_text("no weights")
    with pytest.raises(ValueError, match=r"weights must be a checkpoint or a state dict, got .*text\.pt"):
        load_resnet(model, tmp_path / "text.pt")
    with pytest.raises(FileNotFoundError, match=r"or the name of a network of timm's, got .*none\.pt"):
        load_resnet(model, tmp_path / "none.pt")
    with pytest.raises(ValueError, match=r"weights that timm can download, got resnet26_paper: No pretrained weights"):
        load_resnet(model, "resnet26_paper")
    with pytest.raises(TypeError, match="source must be a file, a name or a state dict, got int"):
        load_resnet(model, 3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="model must be a RedNet or a ResNet, got Linear"):
        load_resnet(nn.Linear(1, 1), timm.create_model("resnet14_cifar").state_dict())
