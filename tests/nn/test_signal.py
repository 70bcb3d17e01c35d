"""Signal propagation: what stacked involutions make of a signal and of its gradient, at the start and when they train.

Each of the first tests below is a public complaint about other implementations; it passes by default, and fails with
the paper's generator and start, which `PAPER` is.
"""

from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

import involution.zoo  # registers RedNet
from involution import Involution1d, Involution2d, Involution3d
from involution.nn import BottleneckGenerator, replace

assert involution.zoo
LAYERS = {1: Involution1d, 2: Involution2d, 3: Involution3d}
SIZES = {1: (64,), 2: (16, 17), 3: (7, 8, 9)}
PAPER: dict[str, Any] = {"norm_layer": nn.BatchNorm2d, "kernel_init": "paper"}


def rms(x: Tensor) -> float:
    return float(x.detach().double().square().mean().sqrt())


def stack(dims: int, channels: int, dtype: torch.dtype = torch.float32, **options: Any) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(LAYERS[dims](channels, **options) for _ in range(8))).to(dtype)


def stir(model: nn.Module, size: float = 0.1) -> nn.Module:
    """Kernels that depend on the input, as after some training."""
    for module in model.modules():
        if isinstance(module, BottleneckGenerator):
            nn.init.kaiming_normal_(module.span.weight, mode="fan_out")
            with torch.no_grad():
                module.span.weight.mul_(size)
    return model


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("channels", [16, 64])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("training", [False, True])
def test_eight_layers_keep_signal_and_gradient(dims: int, channels: int, dtype: torch.dtype, training: bool) -> None:
    for layers in (stack(dims, channels, dtype), stir(stack(dims, channels, dtype))):
        layers.train(training)
        for scale in (1e-2, 1.0, 1e2):
            x = (scale * torch.randn(2, channels, *SIZES[dims])).to(dtype).requires_grad_()
            y = layers(x)
            [gradient] = torch.autograd.grad((y.float() * torch.randn(y.shape)).sum(), x)
            assert 0.5 <= rms(y) / rms(x) <= 2
            assert 0.5 <= rms(gradient) <= 2


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("training", [False, True])
def test_the_output_grows_in_proportion(dims: int, training: bool) -> None:
    """With kernels that depend on the input, too: only its scale makes no difference to them."""
    layers, x = stir(stack(dims, 32), 1.0).train(training), torch.randn(2, 32, *SIZES[dims])
    with torch.no_grad():
        want = layers(x)
        for scale in (1e-2, 0.1, 10.0, 1e2):
            assert rms(layers(scale * x)) / rms(want) == pytest.approx(scale, rel=0.1)


def test_the_papers_layer_does_neither() -> None:
    """What the tests above would notice."""
    layers, x = stack(2, 64, **PAPER), torch.randn(2, 64, 16, 17)
    with torch.no_grad():
        assert rms(layers(x)) > 1e4
        layers.eval()
        assert not layers(4 * x).isfinite().all()


def loss_curve(model: nn.Module, lr: float, inputs: Tensor, labels: Tensor, steps: int, autocast: bool) -> list[float]:
    """SGD with momentum, without clipping."""
    optimizer, losses = torch.optim.SGD(model.train().parameters(), lr, momentum=0.9), []
    for _ in range(steps):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = nn.functional.cross_entropy(model(inputs).float(), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def images(classes: int = 4, size: int = 16) -> tuple[Tensor, Tensor]:
    """Noisy stripes, whose direction and width are their class."""
    torch.manual_seed(0)
    labels = torch.arange(4 * classes) % classes
    rows, columns = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    waves = [torch.sin((columns if i % 2 else rows) * (1.0 + i // 2)) for i in range(classes)]
    return torch.stack([waves[i] for i in labels])[:, None].repeat(1, 3, 1, 1) + 0.3 * torch.randn(
        16, 3, 16, 16
    ), labels


class Neck(nn.Sequential):
    """As in a YOLO's neck: 1x1 convolutions and involutions one after the other, with neither shortcuts nor norms."""

    def __init__(self, **options: Any) -> None:
        layers: list[nn.Module] = [nn.Conv2d(3, 32, 3, stride=2, padding=1), nn.LeakyReLU(0.1)]
        for _ in range(5):
            layers += [Involution2d(32, **options), nn.LeakyReLU(0.1), nn.Conv2d(32, 32, 1), nn.LeakyReLU(0.1)]
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 4))
        for layer in self:
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight)


def neck(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    return Neck(**options)


def replaced_resnet(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=4)
    assert len(replace(model, **options).replaced) == 13
    return model


def is_learning(losses: list[float]) -> bool:
    return all(loss == loss and loss < float("inf") for loss in losses) and losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("make", [neck, replaced_resnet])
@pytest.mark.parametrize("lr", [0.01, 0.1])
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
def test_networks_train_without_clipping(make: Any, lr: float, autocast: bool) -> None:
    """d-li14/involution issues 19 and 26: ResNet's and a YOLO neck's 3x3 convolutions replaced, loss NaN."""
    losses = loss_curve(make(), lr, *images(), steps=200 if make is neck else 40, autocast=autocast)
    assert is_learning(losses)
