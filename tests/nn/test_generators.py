"""Kernel generators: shapes, receptive fields, and costs."""

from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from involution.nn import (
    BottleneckGenerator,
    ContextGenerator,
    Involution1d,
    Involution2d,
    Involution3d,
    LinearGenerator,
    PositionGenerator,
    SoftmaxGenerator,
)
from involution.nn.generators import window_softmax

GENERATORS = [BottleneckGenerator, ContextGenerator, LinearGenerator, PositionGenerator, SoftmaxGenerator]
LAYERS = {1: Involution1d, 2: Involution2d, 3: Involution3d}


def random(kind: Any) -> Any:
    """A layer with random kernels, even if `kind` is initialised as the identity."""
    begins = issubclass(kind, BottleneckGenerator) and kind is not SoftmaxGenerator
    return partial(kind, kernel_init="paper") if begins else kind


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("kind", GENERATORS)
def test_shapes_and_gradients(kind: Any, dims: int) -> None:
    torch.manual_seed(0)
    sizes, stride = (7, 6, 5)[:dims], (2, 1, 3)[:dims]
    layer = LAYERS[dims](8, 3, stride, group_channels=4, kernel_generator=random(kind)).double()
    x = torch.randn(2, 8, *sizes, dtype=torch.float64, requires_grad=True)
    outputs = [-(-size // step) for size, step in zip(sizes, stride, strict=True)]
    assert layer.generator(x).shape == (2, 2, *[3] * dims, *outputs)
    y = layer(x)
    assert y.shape == (2, 8, *outputs)
    y.square().sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())
    layer.eval()  # batch statistics would couple the images
    assert torch.autograd.gradcheck(layer, x.detach()[:1].requires_grad_())


def sees(kind: Any) -> list[tuple[int, int]]:
    """The offsets of the input positions on which the kernel at the centre depends."""
    torch.manual_seed(0)
    layer = Involution2d(128, 5, kernel_generator=random(kind)).double().eval()
    x = torch.randn(1, 128, 9, 9, dtype=torch.float64, requires_grad=True)
    kernel = layer.generator(x)[..., 4, 4]
    if not kernel.requires_grad:
        return []
    [gradient] = torch.autograd.grad(kernel.square().sum(), x, allow_unused=True)
    if gradient is None:
        return []
    return [(i - 4, j - 4) for i, j in gradient[0].abs().sum(0).nonzero().tolist()]


def test_receptive_fields_of_kernels() -> None:
    assert sees(BottleneckGenerator) == sees(LinearGenerator) == sees(SoftmaxGenerator) == [(0, 0)]
    assert sees(ContextGenerator) == [(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1)]
    assert sees(PositionGenerator) == []


def test_position_generator_serves_every_size() -> None:
    """Corners have the same coordinates at every size, and all images the same kernels."""
    layer = Involution2d(16, 3, kernel_generator=PositionGenerator)
    small, large = layer.generator(torch.randn(1, 16, 4, 4)), layer.generator(torch.randn(2, 16, 9, 6))
    torch.testing.assert_close(small[0, ..., -1, 0], large[1, ..., -1, 0])
    torch.testing.assert_close(large[0], large[1])
    assert not torch.allclose(small[..., 0, 0], small[..., 0, 1])


@pytest.mark.parametrize("dilation", [1, 2])
def test_softmax_generator_averages_over_the_input(dilation: int) -> None:
    """A constant image does not change, not even at the border."""
    layer = Involution2d(16, 5, stride=2, dilation=dilation, kernel_generator=SoftmaxGenerator)
    x = torch.randn(1, 16, 1, 1).expand(1, 16, 9, 7).contiguous()
    torch.testing.assert_close(layer(x), x[:, :, ::2, ::2])
    kernels = layer.generator(torch.randn(1, 16, 9, 7))
    assert (kernels >= 0).all()
    torch.testing.assert_close(kernels.sum((2, 3)), torch.ones(1, 1, 5, 4))
    assert kernels[0, 0, 0, 0, 0, 0] == 0  # outside


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_window_softmax_equals_a_softmax_per_window(dtype: torch.dtype, channels_last: bool) -> None:
    """Including the lowest possible logits, and windows without a tap inside the input."""
    torch.manual_seed(0)
    sizes, kernel_size, stride, padding, dilation = (2, 5), (2, 3), (1, 2), [(1, 2), (2, 2)], (3, 2)
    logits = torch.randn(2, 3, *kernel_size, 2, 3, dtype=dtype)
    logits[0] += torch.finfo(dtype).min
    if channels_last:
        logits = logits.permute(0, 4, 5, 1, 2, 3).contiguous().permute(0, 3, 4, 5, 1, 2)
    found = window_softmax(logits, sizes, stride, padding, dilation)
    assert found.stride() == logits.stride()
    missed = 0
    for o, p in product(range(2), range(3)):
        lines = [u for u in range(2) if 0 <= o + 3 * u - 1 < 2]
        columns = [v for v in range(3) if 0 <= 2 * p + 2 * v - 2 < 5]
        window = found[..., o, p]
        if lines and columns:
            inside = logits[..., o, p][:, :, lines][..., columns]
            want = inside.flatten(2).softmax(2).view_as(inside)
            torch.testing.assert_close(window[:, :, lines][..., columns], want)
        missed += not (lines and columns)
        torch.testing.assert_close(window.sum((2, 3)), torch.ones(2, 3, dtype=dtype))
    assert missed == 3


@pytest.mark.parametrize(
    ("kind", "multiply_adds"),
    [  # per position, 32 channels in 2 groups, 5x5: as the docstrings give them
        (BottleneckGenerator, 32 * 8 + 8 * 50),
        (ContextGenerator, 32 * 8 + 9 * 8 + 8 * 50),
        (LinearGenerator, 32 * 50),
        (SoftmaxGenerator, 32 * 8 + 8 * 50),
    ],
)
def test_costs_are_the_documented_ones(kind: Any, multiply_adds: int) -> None:
    generator = Involution2d(32, 5, kernel_generator=kind).generator.eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        generator(torch.randn(3, 32, 6, 7))
    assert counter.get_total_flops() == 2 * 3 * 6 * 7 * multiply_adds


def test_position_generator_costs_once_a_batch() -> None:
    generator = Involution2d(32, 5, kernel_generator=PositionGenerator).generator
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        generator(torch.randn(3, 32, 6, 7))
    assert counter.get_total_flops() == 2 * 6 * 7 * (2 * 32 + 32 * 50)
