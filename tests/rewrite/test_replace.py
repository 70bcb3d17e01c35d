"""replace: involutions in the place of a network's 3x3 convolutions."""

import inspect
from typing import Any

import pytest
import timm
import torch
from torch import nn
from torchvision.models import resnet18

from involution.nn import Involution2d
from involution.rewrite import replace


class Odd(nn.Module):
    """Every kind of 3x3 convolution that cannot be replaced, and a few that can."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Conv2d(32, 32, 3, padding=1)
        self.strided = nn.Conv2d(32, 32, 3, stride=2, padding=1, bias=False)
        self.dilated = nn.Conv2d(32, 32, 3, padding=2, dilation=2)
        self.same = nn.Conv2d(32, 32, 3, padding="same")
        self.twice = nn.Sequential(self.plain, nn.ReLU())
        self.wider = nn.Conv2d(32, 64, 3, padding=1)
        self.depthwise = nn.Conv2d(64, 64, 3, padding=1, groups=64)
        self.uneven = nn.Conv2d(24, 24, 3, padding=1)
        self.valid = nn.Conv2d(32, 32, 3)
        self.reflecting = nn.Conv2d(32, 32, 3, padding=1, padding_mode="reflect")
        self.pointwise = nn.Conv2d(32, 32, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.same(self.dilated(self.strided(self.twice(self.plain(x)))))


def test_what_is_replaced_and_why_not() -> None:
    network = Odd().eval()
    wanted = network(torch.randn(1, 32, 9, 7)).shape
    report = replace(network, kernel_size=5)
    assert report.replaced == ["plain", "strided", "dilated", "same", "twice.0"]
    assert report.left == {
        "wider": "it has 32 input and 64 output channels",
        "depthwise": "it has 64 groups",
        "uneven": "its 24 channels do not divide by 16",
        "valid": "its padding is (0, 0), which does not preserve the size",
        "reflecting": "its padding is reflect",
    }
    assert network.twice[0] is network.plain  # still one layer in two places
    assert network(torch.randn(1, 32, 9, 7)).shape == wanted
    assert (network.dilated.dilation, network.strided.stride) == ((2, 2), (2, 2))
    assert network.plain.kernel_size == (5, 5)
    assert not network.plain.training
    assert report.multiply_adds is None
    assert "replaced 5 of 10 3x3 convolutions\nleft wider: it has 32 input" in str(report)


def test_a_resnet_trains_with_involutions_and_its_costs_are_reported() -> None:
    from involution.cost import multiply_adds, parameters

    torch.manual_seed(0)
    network = resnet18(num_classes=4)
    before = parameters(network), multiply_adds(network, (3, 64, 64))
    report = replace(network, example_input=torch.randn(1, 3, 64, 64))
    after = parameters(network), multiply_adds(network, (3, 64, 64))
    assert (report.parameters, report.multiply_adds) == tuple(zip(before, after, strict=True))
    assert len(report.replaced) == 13  # of 16: the first convolutions of three stages widen
    assert set(report.left) == {f"layer{stage}.0.conv1" for stage in (2, 3, 4)}
    assert all(not module.num_batches_tracked for module in network.modules() if isinstance(module, nn.BatchNorm2d))
    assert network.training
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
    x, y = torch.randn(8, 3, 64, 64), torch.arange(8) % 4
    losses = []
    for _ in range(8):
        loss = nn.functional.cross_entropy(network(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_filter_dtype_and_further_arguments() -> None:
    network = timm.create_model("resnet26", num_classes=0).double()
    report = replace(
        network, filter=lambda name, conv: name.startswith("layer3"), group_channels=32, memory_efficient=True
    )
    assert report.replaced == [f"layer3.{block}.conv2" for block in (0, 1)]
    assert report.left["layer2.0.conv2"] == "the filter excludes it"
    layer = network.layer3[0].conv2
    assert isinstance(layer, Involution2d)
    assert (layer.group_channels, layer.memory_efficient, layer.stride) == (32, True, (2, 2))
    assert network(torch.randn(2, 3, 64, 64, dtype=torch.float64)).dtype == torch.float64


@pytest.mark.parametrize(
    ("module", "error", "message"),
    [
        ("resnet", TypeError, "module must be an nn.Module, got str"),
        (nn.Conv2d(16, 16, 3), ValueError, "got a convolution itself"),
    ],
)
def test_bad_arguments(module: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        replace(module)


@pytest.mark.parametrize("group_channels", [0, 1.5, "each", True])
def test_bad_group_channels(group_channels: Any) -> None:
    with pytest.raises(ValueError, match="group_channels must be a positive int or 'all', got"):
        replace(resnet18(), group_channels=group_channels)


def test_one_kernel_for_all_channels() -> None:
    network = nn.Sequential(nn.Conv2d(24, 24, 3, padding=1))
    replace(network, group_channels="all")
    assert (network[0].groups, network[0].group_channels) == (1, 24)


def test_an_error_leaves_the_network_unchanged() -> None:
    network, asked = resnet18(), []

    def third(name: str, convolution: nn.Conv2d) -> bool:
        asked.append(name)
        if len(asked) == 3:
            raise KeyError(name)
        return True

    with pytest.raises(KeyError):
        replace(network, third)
    with pytest.raises(TypeError, match="heads"):
        replace(network, heads=3)
    assert not any(isinstance(module, Involution2d) for module in network.modules())


def test_a_trained_networks_other_weights_are_preserved() -> None:
    network = resnet18()
    for parameter in network.parameters():
        parameter.grad = torch.randn_like(parameter)
    for buffer in network.buffers():
        buffer.fill_(2)
    before = {name: one.clone() for name, one in network.state_dict().items()}
    identities = {name: id(one) for name, one in network.named_parameters()}
    replaced = tuple(f"{name}." for name in replace(network).replaced)
    after = network.state_dict()
    kept = [name for name in before if not name.startswith(replaced)]
    assert len(kept) == len(before) - 13
    assert kept == [name for name in after if not name.startswith(replaced)]
    assert all(torch.equal(after[name], before[name]) for name in kept)
    assert all(identities[name] == id(one) for name, one in network.named_parameters() if name in kept)


@pytest.mark.skipif("kernel_init" not in inspect.signature(Involution2d).parameters, reason="kernels begin at random")
@pytest.mark.parametrize("stride", [1, 2])
def test_new_layers_are_initialised_as_the_identity(stride: int) -> None:
    network = nn.Sequential(nn.Conv2d(32, 32, 3, stride=stride, padding=1))
    replace(network)
    x = torch.randn(2, 32, 9, 8)
    for mode in (True, False):
        torch.testing.assert_close(network.train(mode)(x), x[:, :, ::stride, ::stride])
