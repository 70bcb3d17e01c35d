"""Feature pyramids: the kernel generators of their involutions, and one-pixel levels."""

from typing import Any

import pytest
import torch
from torch import nn

from involution import Involution2d
from involution.cost.count import cost
from involution.nn import ChannelL2Norm
from involution.zoo.fpn import GeneratorBatchNorm2d, PyramidBackbone, involution_layer


@pytest.mark.parametrize(("backbone", "norms"), [("rednet26", 1), ("rednetv2_26", 0), ("resnet26_paper", 0), ("", 0)])
def test_only_the_papers_networks_have_the_papers_generator(backbone: str, norms: int) -> None:
    layer = involution_layer(32, backbone)
    assert sum(isinstance(module, nn.BatchNorm2d) for module in layer.modules()) == norms
    assert isinstance(layer.generator.norm, ChannelL2Norm) != bool(norms)
    x = torch.randn(2, 32, 9, 8)
    torch.testing.assert_close(layer(x), x)


@pytest.mark.parametrize("backbone", ["rednet26", "rednetv2_26"])
def test_a_pyramid_has_its_backbones_generator(backbone: str) -> None:
    pyramid = PyramidBackbone(backbone, "involution", out_channels=32)
    layers = [module for module in pyramid.fpn.modules() if isinstance(module, Involution2d)]
    assert len(layers) == 4
    assert all(isinstance(layer.generator.norm, nn.BatchNorm2d) == (backbone == "rednet26") for layer in layers)


@pytest.mark.parametrize("backbone", ["rednet26", "rednetv2_26"])
def test_a_pyramid_of_involutions_takes_one_small_image_in_training(backbone: str) -> None:
    """Its last level is one pixel, for which torch's batch norm raises."""
    norm = {"norm_layer": "groupnorm1"}
    pyramid = PyramidBackbone(backbone, "involution", out_channels=32, extra_levels="pool", **norm).train()
    levels = list(pyramid(torch.randn(1, 3, 32, 32)).values())
    assert tuple(levels[-1].shape[2:]) == (1, 1)
    sum(level.square().mean() for level in levels).backward()
    assert all(parameter.grad.isfinite().all() for parameter in pyramid.fpn.parameters())


def test_a_generators_batch_norm_of_one_value_uses_running_statistics() -> None:
    torch.manual_seed(0)
    norm = GeneratorBatchNorm2d(4).double()
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    norm(3 + 2 * torch.randn(2, 4, 5, 5, dtype=torch.float64))
    before = {name: value.clone() for name, value in norm.state_dict().items()}
    x = torch.randn(1, 4, 1, 1, dtype=torch.float64, requires_grad=True)
    got = norm(x)
    torch.testing.assert_close(norm.state_dict(), before, rtol=0, atol=0)
    want = norm.eval()(x)
    assert want.requires_grad
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    assert torch.autograd.gradcheck(norm.train(), x)


@pytest.mark.parametrize("shape", [(2, 4, 1, 1), (1, 4, 1, 2), (1, 4, 2, 1), (3, 4, 5, 6)])
@pytest.mark.parametrize("options", [{}, {"affine": False}, {"momentum": None}, {"track_running_stats": False}])
def test_a_generators_batch_norm_is_torchs_otherwise(shape: tuple[int, ...], options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    plain, norm = nn.BatchNorm2d(4, **options), GeneratorBatchNorm2d(4, **options)
    assert list(norm.state_dict()) == list(plain.state_dict())
    for training in (True, True, False):
        x = torch.randn(shape)
        torch.testing.assert_close(norm.train(training)(x), plain.train(training)(x), rtol=0, atol=0)
        torch.testing.assert_close(norm.state_dict(), plain.state_dict(), rtol=0, atol=0)


def test_a_generators_batch_norm_raises_what_torchs_raises() -> None:
    with pytest.raises(ValueError, match="expected 4D input"):
        GeneratorBatchNorm2d(4)(torch.randn(1, 4))
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        GeneratorBatchNorm2d(4, track_running_stats=False)(torch.randn(1, 4, 1, 1))


def test_a_generators_batch_norm_is_counted_as_a_batch_norm() -> None:
    norms = [cost(nn.Sequential(kind(4)), (4, 5, 6)) for kind in (GeneratorBatchNorm2d, nn.BatchNorm2d)]
    assert norms[0].total == norms[1].total == 2 * 4 * 5 * 6
    assert norms[0].parameters == norms[1].parameters == 8
