"""Feature pyramids: whose generator their involutions have, and how they begin."""

import pytest
import torch
from torch import nn

from involution import Involution2d
from involution.zoo.fpn import PyramidBackbone, involution_layer


@pytest.mark.parametrize(("backbone", "norms"), [("rednet26", 1), ("rednetv2_26", 0), ("resnet26_paper", 0), ("", 0)])
def test_the_papers_networks_alone_have_the_papers_generator(backbone: str, norms: int) -> None:
    layer = involution_layer(32, backbone)
    assert sum(isinstance(module, nn.BatchNorm2d) for module in layer.modules()) == norms
    x = torch.randn(2, 32, 9, 8)
    torch.testing.assert_close(layer(x), x)


@pytest.mark.parametrize("backbone", ["rednet26", "rednetv2_26"])
def test_a_pyramid_has_its_backbones_generator(backbone: str) -> None:
    pyramid = PyramidBackbone(backbone, "involution", out_channels=32)
    layers = [module for module in pyramid.fpn.modules() if isinstance(module, Involution2d)]
    assert len(layers) == 4
    assert all(isinstance(layer.generator.norm, nn.BatchNorm2d) == (backbone == "rednet26") for layer in layers)


def test_a_pyramid_of_scale_invariant_involutions_takes_one_small_image_in_training() -> None:
    """Its last level is a pixel, whose spread a batch norm would ask for."""
    norm = {"norm_layer": "groupnorm1"}
    pyramid = PyramidBackbone("rednetv2_26", "involution", out_channels=32, extra_levels="pool", **norm).train()
    assert [tuple(level.shape[2:]) for level in pyramid(torch.randn(1, 3, 32, 32)).values()][-1] == (1, 1)
