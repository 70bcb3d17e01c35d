import pytest
import torch
from torch import nn

from involution.cost import multiply_adds, parameters
from involution.nn import Involution2d


def test_convolution_and_linear_by_hand():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 10))
    assert multiply_adds(model, (3, 8, 8)) == 3 * 3 * 3 * 8 * (4 * 4) + 8 * 16 * 10
    assert parameters(model) == 3 * 3 * 3 * 8 + 8 + 8 * 16 * 10 + 10


@pytest.mark.parametrize("stride", [1, 2])
def test_involution_by_hand(stride):
    channels, kernel, size = 32, 7, 12
    out = (size // stride) ** 2
    width, span = channels // 4, (channels // 16) * kernel**2
    generation = (channels * width + width * span) * out
    aggregation = kernel**2 * channels * out
    layer = Involution2d(channels, kernel, stride)
    assert multiply_adds(layer, (channels, size, size)) == generation + aggregation


def test_the_model_is_left_alone():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    multiply_adds(model, (3, 4, 4))
    assert model.training
    for name, value in model.state_dict().items():
        assert value.device.type == "cpu"
        assert torch.equal(value, before[name])


def test_frozen_parameters_count():
    model = nn.Linear(3, 2)
    model.weight.requires_grad_(False)
    assert parameters(model) == 8
