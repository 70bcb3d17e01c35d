"""Sliding windows, scales and mirrors."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from involution.tasks.segment.inference import Inference, sliding_window


def pointwise(x: Tensor) -> Tensor:
    """A network whose output at a pixel depends on that pixel only."""
    return torch.stack([x[:, 0] - x[:, 1], x[:, 2], x.square().sum(1)], dim=1)


@pytest.mark.parametrize("window", [(16, 16), (10, 7), (64, 64), (1, 5)])
@pytest.mark.parametrize("stride", [None, (5, 3), (1, 1)])
@pytest.mark.parametrize("size", [(16, 32), (17, 23), (5, 9)])
def test_windows_of_a_pointwise_network_are_the_whole(window: Any, stride: Any, size: Any) -> None:
    stride = window if stride is None else tuple(map(min, stride, window))
    image = torch.randn(1, 3, *size, dtype=torch.float64)
    torch.testing.assert_close(sliding_window(pointwise, image, window, stride), pointwise(image))


def test_a_3x3_convolution_differs_only_beside_the_seam() -> None:
    """In one pixel on either side of it."""
    network = nn.Conv2d(3, 4, 3, padding=1).double()
    image = torch.randn(1, 3, 12, 24, dtype=torch.float64)
    whole, parts = network(image), sliding_window(network, image, (12, 12), (12, 12))
    differs = (whole - parts).abs().amax((0, 1, 2)) > 1e-9
    assert differs.nonzero().flatten().tolist() == [11, 12]


def test_overlaps_are_averaged() -> None:
    """By a network that returns the window's number."""
    asked: list[Tensor] = []

    def network(x: Tensor) -> Tensor:
        asked.append(x)
        return torch.full_like(x[:, :1], float(len(asked)))

    found = sliding_window(network, torch.zeros(1, 3, 1, 10), (1, 4), (1, 3))
    assert found.flatten().tolist() == [1, 1, 1, 1.5, 2, 2, 2.5, 3, 3, 3]  # windows at 0, 3 and 6
    assert len(asked) == 3


def test_one_pixel_more_is_one_window_more() -> None:
    sizes = []

    def network(x: Tensor) -> Tensor:
        sizes.append(x.shape[-2:])
        return x

    sliding_window(network, torch.zeros(1, 3, 8, 9), (4, 4), (4, 4))
    assert sizes == [(4, 4)] * 6  # two rows of three


def test_scales_and_mirrors_are_averaged() -> None:
    """Against the definition, with a network that is not symmetric."""
    from torch.nn import functional as F

    network = nn.Conv2d(3, 4, 3, padding=1).double()
    image = torch.randn(3, 12, 20, dtype=torch.float64)
    found = Inference(scales=(1.0, 0.5), flip=True).probabilities(network, image, (24, 40))
    views = []
    for size in ((12, 20), (6, 10)):
        x = image[None] if size == (12, 20) else F.interpolate(image[None], size=size, mode="bilinear", antialias=True)
        for flip in (False, True):
            logits = network(x.flip(-1)).flip(-1) if flip else network(x)
            views.append(F.interpolate(logits.float(), size=(24, 40), mode="bilinear").softmax(1)[0])
    torch.testing.assert_close(found, torch.stack(views).mean(0))
    torch.testing.assert_close(found.sum(0), torch.ones(24, 40))
    mirrored = Inference(scales=(1.0, 0.5), flip=True).probabilities(network, image.flip(-1), (24, 40))
    torch.testing.assert_close(mirrored, found.flip(-1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scales": ()}, "scales must be positive factors, got ()"),
        ({"scales": (1.0, 0.0)}, "scales must be positive"),
        ({"stride": (4, 4)}, "window_stride needs a window, got (4, 4) without one"),
        ({"window": (0, 4)}, "window must be at least 1 along each axis, got (0, 4)"),
        ({"window": (8, 8), "stride": (8, 9)}, "window_stride must be from 1 to the window's (8, 8), got (8, 9)"),
        ({"window": (8, 8), "stride": (0, 8)}, "window_stride must be from 1"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        Inference(**options).check()
    assert message in str(caught.value)
