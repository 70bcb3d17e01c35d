"""Geometry from the image to a layer's positions and back, against what transforms and gradients really do."""

from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform
from torch import Tensor, nn
from torchvision.transforms import v2

import involution.zoo  # noqa: F401
from involution.nn import Involution2d
from involution.show.layers import each_call, involutions
from involution.show.subject import receptive_field
from involution.show.view import Grid, View, jump, preprocess
from involution.tasks.classify.preprocessing import Preprocessing as Photograph
from involution.tasks.segment.preprocessing import Preprocessing as Street

ZERO = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
IDENTITY = View((1.0, 1.0), (0.0, 0.0), (64, 64))


@pytest.mark.parametrize(
    "transform",
    [
        Photograph(64, 72, *ZERO).evaluation(),
        Photograph(32, 32, *ZERO).evaluation(),
        Photograph(96, 80, *ZERO).evaluation(),  # the crop pads
        Street(75, *ZERO).evaluation(),
        create_transform((3, 64, 64), mean=ZERO[0], std=ZERO[1], crop_pct=0.8),
        create_transform((3, 64, 96), mean=ZERO[0], std=ZERO[1], crop_pct=0.9, crop_mode="squash"),
    ],
)
@pytest.mark.parametrize("size", [(150, 101), (90, 130)])
def test_a_bright_square_is_where_the_view_says(transform: Any, size: tuple[int, int]) -> None:
    pixels = np.zeros((size[1], size[0], 3), np.uint8)
    left, top = size[0] // 2 - 20, size[1] // 2 + 5
    pixels[top : top + 12, left : left + 12] = 255
    x, view = preprocess(transform, Image.fromarray(pixels))
    assert view.size == (x.shape[2], x.shape[1])
    weights = x[0] / x[0].sum()
    column = (weights.sum(0) * (torch.arange(x.shape[2]) + 0.5)).sum().item()
    row = (weights.sum(1) * (torch.arange(x.shape[1]) + 0.5)).sum().item()
    assert (column, row) == pytest.approx(view.to_input(left + 6, top + 6), abs=0.1)
    assert view.to_image((column, row, column, row)) == pytest.approx((left + 6, top + 6) * 2, abs=0.25)


def test_a_step_that_cannot_be_followed_is_named() -> None:
    with pytest.raises(ValueError, match="got Pad"):
        preprocess(v2.Compose([v2.ToImage(), v2.Pad(2)]), Image.new("RGB", (8, 8)))


@pytest.mark.parametrize("halvings", range(6))
def test_jump_of_every_chain_of_halvings(halvings: int) -> None:
    for whole in range(2, 400):
        part = whole
        for _ in range(halvings):
            part = -(-part // 2)
        if part > 1:
            assert jump(whole, part) == 2**halvings
    assert jump(224, 75) == pytest.approx(224 / 75)


def test_grid_of_a_strided_layer_by_hand() -> None:
    """A 7x7 layer of stride 2 behind stride 4: position 3 is centred on pixel 24 and reaches 3 * 4 pixels around it."""
    layer = Involution2d(16, 7, stride=2)
    grid = Grid.of(layer, (64, 64), (16, 16), (8, 8))
    assert grid.position(24.5, 16.5) == (3, 2)
    assert grid.position(28.4, 0.0) == (3, 0)
    assert grid.position(64.0, 28.6) == (7, 4)
    assert grid.footprint(3, 2) == (10.5, 2.5, 38.5, 30.5)  # 7 taps of 4 pixels, centred on (24.5, 16.5)
    assert grid.extent() == (-3.5, -3.5, 60.5, 60.5)
    halved = View((0.5, 0.5), (-4.0, 0.0), (64, 64))
    assert halved.to_image(grid.footprint(3, 2)) == (29.0, 5.0, 85.0, 61.0)  # twice as large in the image


def traced(model: nn.Module, name: str, size: tuple[int, int], place: tuple[int, int]) -> tuple[Tensor, Grid]:
    """The receptive field of a layer's position, and its grid."""
    found: dict[str, Any] = {}
    x = torch.randn(1, 3, *size, requires_grad=True)
    with each_call({name: involutions(model)[name]}, lambda *call: found.update({call[0]: call[1:]})):
        model.eval()(x)
    layer, inside, _, output = found[name]
    grid = Grid.of(layer, size, tuple(inside.shape[2:]), tuple(output.shape[2:]))
    return receptive_field(output[0], x, *place), grid


def span(values: Tensor) -> tuple[int, int]:
    """First index and end of the nonzero values."""
    found = values.nonzero().flatten()
    return int(found[0]), int(found[-1]) + 1


@pytest.mark.parametrize(("stride", "dilation"), [(1, 1), (2, 1), (1, 2)])
def test_one_layer_receives_exactly_its_footprint(stride: int, dilation: int) -> None:
    """A strided 1x1 convolution reads the centres of the taps' cells, and the layer all of its 7 x 7 taps."""
    torch.manual_seed(0)
    layer = Involution2d(16, 7, stride=stride, dilation=dilation, kernel_init="paper")
    model = nn.Sequential(nn.Conv2d(3, 16, 1, stride=4), layer)
    field, grid = traced(model, "1", (128, 128), (16 // stride - 3, 16 // stride - 2))
    left, top, right, bottom = grid.footprint(16 // stride - 3, 16 // stride - 2)
    assert right - left == bottom - top == 7 * 4 * dilation
    for taps, start, end in ((field.sum(0), left, right), (field.sum(1), top, bottom)):
        first, last = span(taps)
        assert (first + 0.5, last - 0.5) == (start + 2 * dilation, end - 2 * dilation)  # half a cell inside
        assert int((taps > 0).sum()) == 7


@pytest.mark.parametrize("name", ["stem.conv2", "layer1.0.conv2", "layer2.0.conv2"])
def test_footprints_of_a_network_are_the_centres_of_what_it_receives(name: str) -> None:
    """In a RedNet with strided convolutions, max pooling and strided involutions."""
    torch.manual_seed(0)
    model = timm.create_model("rednet26", kernel_init="paper", zero_init_last=False)
    field, grid = traced(model, name, (157, 150), (8, 9))
    left, top, right, bottom = grid.footprint(8, 9)
    for influence, start, end in ((field.sum(0), left, right), (field.sum(1), top, bottom)):
        first, last = span(influence)
        assert (first + last) / 2 == (start + end) / 2
        assert last - first > end - start  # the layers before it widen it
