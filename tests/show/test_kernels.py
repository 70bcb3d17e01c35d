import pytest
import torch
from torch import nn

from involution.nn import Involution2d
from involution.show import catch_kernel_maps, draw_kernels, kernel_heat


@pytest.fixture
def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Involution2d(32, 3), nn.ReLU(), Involution2d(32, 5, stride=2))


def test_maps_are_what_the_generators_give(model):
    images = torch.randn(2, 32, 8, 8)
    maps = catch_kernel_maps(model, images)
    assert list(maps) == ["0", "2"]
    assert maps["2"].shape == (2, 2, 5, 5, 4, 4)
    assert not maps["2"].requires_grad
    assert model.training
    model.eval()
    torch.testing.assert_close(maps["0"], model[0].generator(images).detach())


def test_hooks_are_gone_afterwards_even_after_an_error(model):
    catch_kernel_maps(model, torch.randn(1, 32, 8, 8))
    with pytest.raises(ValueError, match="input"):
        catch_kernel_maps(model, torch.randn(1, 31, 8, 8))
    assert not any(module._forward_hooks for module in model.modules())
    assert model.training


def test_order_is_the_callers(model):
    assert list(catch_kernel_maps(model, torch.randn(1, 32, 8, 8), ["2", "0"])) == ["2", "0"]


@pytest.mark.parametrize("layers", [["1"], ["0", "nowhere"], []])
def test_wrong_layers(model, layers):
    with pytest.raises(ValueError, match="layers must be of 0, 2"):
        catch_kernel_maps(model, torch.randn(1, 32, 8, 8), layers)


def test_a_layer_that_does_not_run_is_named():
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = Involution2d(16, 3), Involution2d(16, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x)

    with pytest.raises(RuntimeError, match="idle"):
        catch_kernel_maps(Half(), torch.randn(1, 16, 4, 4))


def test_heat_sums_each_kernel():
    kernels = torch.arange(2 * 3 * 2 * 2 * 4 * 5, dtype=torch.float64).reshape(2, 3, 2, 2, 4, 5)
    heat = kernel_heat(kernels)
    assert heat.shape == (2, 3, 4, 5)
    for n, g, h, w in [(0, 0, 0, 0), (1, 2, 3, 4), (0, 1, 2, 3)]:
        assert heat[n, g, h, w] == sum(kernels[n, g, i, j, h, w] for i in range(2) for j in range(2))


def test_picture_draws_the_heat(model, tmp_path):
    images = torch.rand(3, 32, 8, 8)
    maps = catch_kernel_maps(model, images, ["2"])
    heats = {name: kernel_heat(kernels) for name, kernels in maps.items()}
    file = tmp_path / "new folder" / "kernels.png"
    figure = draw_kernels(images[:, :3], heats, file)
    assert file.read_bytes().startswith(b"\x89PNG")
    axes = [axis for axis in figure.axes if axis.images]
    assert len(axes) == 3 * (1 + 2)  # three images; the image row and one row per group
    for group in range(2):
        for image in range(3):
            drawn = torch.as_tensor(axes[3 * (1 + group) + image].images[0].get_array().data)
            torch.testing.assert_close(drawn, maps["2"][image, group].sum(dim=(0, 1)))


def test_wrong_number_of_images(tmp_path):
    with pytest.raises(ValueError, match=r"heats\['x'\].*2 images"):
        draw_kernels(torch.rand(2, 3, 8, 8), {"x": torch.rand(3, 1, 8, 8)}, tmp_path / "no.png")
    assert not (tmp_path / "no.png").exists()
