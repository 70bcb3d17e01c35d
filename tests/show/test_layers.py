"""The kernel maps are those that the layers use, and layers are chosen by name or index."""

from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import involution.zoo  # noqa: F401
from involution import involution2d
from involution.nn import BottleneckGenerator, Involution2d, LocalSelfAttention2d
from involution.show.kernels import kernel_heat
from involution.show.layers import Statistics, each_call, involutions, last_of_stages, select


def recomputed(layer: Any, x: Tensor, kernel_map: Tensor) -> Tensor:
    padding = tuple(d * (k - 1) // 2 for k, d in zip(layer.kernel_size, layer.dilation, strict=True))
    values = layer.value(x) if isinstance(layer, LocalSelfAttention2d) else x
    return involution2d(values, kernel_map, layer.stride, padding, layer.dilation)


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
def test_the_map_gives_the_layers_output(gradients: bool, channels_last: bool) -> None:
    torch.manual_seed(0)
    paper = {"kernel_init": "paper", "norm_layer": nn.BatchNorm2d}
    model = nn.Sequential(
        Involution2d(32, 7, **paper),
        Involution2d(32, (3, 5), stride=(2, 1), **paper),
        Involution2d(32, 3, dilation=2, memory_efficient=True, kernel_init="paper"),
        LocalSelfAttention2d(32, 5, stride=2, heads=4, relative_position="factorised"),
    ).eval()
    called: list[str] = []

    def use(name: str, layer: Any, x: Tensor, kernel_map: Tensor, output: Tensor) -> None:
        torch.testing.assert_close(output, recomputed(layer, x, kernel_map), rtol=1e-5, atol=1e-5)
        assert not kernel_map.requires_grad
        called.append(name)

    images = torch.randn(2, 32, 12, 10)
    images = images.to(memory_format=torch.channels_last) if channels_last else images
    with each_call(involutions(model), use), torch.set_grad_enabled(gradients):
        model(images)
    assert called == ["0", "1", "2", "3"]
    assert not any(module._forward_hooks for module in model.modules())


def test_the_map_gives_the_layers_output_in_a_network() -> None:
    """A RedNet with random statistics of its batch norms, whose fused layers store no map."""
    torch.manual_seed(0)
    model = timm.create_model("rednet14_cifar", zero_init_last=False).eval()
    for name, buffer in model.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            buffer.uniform_(0.5, 1.5)
    for module in model.modules():
        if isinstance(module, BottleneckGenerator):
            nn.init.normal_(module.span.weight, std=0.1)
    compared: list[str] = []

    def use(name: str, layer: Any, x: Tensor, kernel_map: Tensor, output: Tensor) -> None:
        torch.testing.assert_close(output, recomputed(layer, x, kernel_map), rtol=1e-5, atol=1e-5)
        compared.append(name)

    with each_call(involutions(model), use), torch.no_grad():
        model(torch.randn(1, 3, 32, 32))
    assert compared == list(involutions(model))


def test_the_sums_of_an_identity_are_exactly_one() -> None:
    sums: list[Tensor] = []
    model = nn.Sequential(Involution2d(32, 7), Involution2d(32, 3, stride=2))
    with each_call(involutions(model), lambda *call: sums.append(kernel_heat(call[3]))):
        model(torch.randn(1, 32, 9, 9))
    assert [one.shape for one in sums] == [(1, 2, 9, 9), (1, 2, 5, 5)]
    assert all(bool((one == 1).all()) for one in sums)


def test_statistics() -> None:
    kernel_map = torch.zeros(1, 1, 1, 3, 1, 2)
    kernel_map[0, 0, 0, :, 0, 0] = torch.tensor([1.0, -1.0, 3.0])  # sum 3, standard deviation sqrt(8/3)
    kernel_map[0, 0, 0, :, 0, 1] = torch.tensor([1.0, 1.0, -1.0])  # sum 1, standard deviation sqrt(8/9)
    found = Statistics.of(kernel_map)
    assert found == pytest.approx((2.0, 1.0, ((8 / 3) ** 0.5 + (8 / 9) ** 0.5) / 2, 2 / 6))


NAMES = ["stem.conv2", "layer1.0.conv2", "layer1.1.conv2", "layer2.0.conv2", "fpn.blocks.0", "fpn.blocks.1"]


def test_select_takes_names_and_indices_once() -> None:
    assert select(NAMES, ["2", "stem.conv2", "layer1.1.conv2"]) == ["layer1.1.conv2", "stem.conv2"]


@pytest.mark.parametrize("wrong", ["6", "layer1", "-1", ""])
def test_an_unknown_layer_lists_the_known_ones(wrong: str) -> None:
    with pytest.raises(
        ValueError, match=rf"got '{wrong}'; there are 0 stem.conv2, 1 layer1.0.conv2, .*, 5 fpn.blocks.1$"
    ):
        select(NAMES, ["0", wrong])


def test_the_default_is_the_last_layer_of_every_stage_and_all_levels() -> None:
    assert last_of_stages(NAMES) == ["stem.conv2", "layer1.1.conv2", "layer2.0.conv2", "fpn.blocks.0", "fpn.blocks.1"]
    assert last_of_stages(["0", "1"]) == ["0", "1"]
    with torch.device("meta"):
        model = timm.create_model("rednetv2_50")
    last = ["stem.conv2", "layer1.2.conv2", "layer2.3.conv2", "layer3.5.conv2", "layer4.2.conv2"]
    assert last_of_stages(list(involutions(model))) == last
