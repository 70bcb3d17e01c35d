"""Batch norm over all processes; test_scale_out.py runs two."""

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
import torch
import torch.distributed as dist
from torch import nn

from involution.engine.sync_batch_norm import (
    GeneratorSyncBatchNorm,
    SyncBatchNorm,
    SyncBatchNorms,
    norms_of_involutions,
)
from involution.zoo.fpn import GeneratorBatchNorm2d, involution_layer


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A group of one process."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def converted(norm: nn.Module) -> nn.Module:
    return SyncBatchNorms(on_cpu=True).apply(nn.Sequential(norm))[0]


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("options", [{}, {"affine": False}, {"momentum": None}, {"track_running_stats": False}])
def test_of_one_process_it_is_batch_norm(dims: int, options: dict, alone: None) -> None:
    torch.manual_seed(0)
    kind = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims - 1]
    plain, norm = kind(4, **options).double(), converted(kind(4, **options)).double()
    assert type(norm) is SyncBatchNorm
    for _ in range(2):
        x = torch.randn(3, 4, *[5] * dims, dtype=torch.float64)
        inputs = [x.clone().requires_grad_() for _ in range(2)]
        outputs = [norm(inputs[0]), plain(inputs[1])]
        torch.testing.assert_close(*outputs)
        grads = [torch.autograd.grad(y.sin().sum(), z)[0] for y, z in zip(outputs, inputs, strict=True)]
        torch.testing.assert_close(*grads)
    torch.testing.assert_close(norm.state_dict(), plain.state_dict())
    torch.testing.assert_close(norm.eval()(x), plain.eval()(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_statistics_are_float32_at_least(dtype: torch.dtype, alone: None) -> None:
    """Sums of so many elements would overflow 16 bits, and counts would be rounded."""
    x = (5 + torch.randn(4, 3, 257, 257)).to(dtype)
    plain, norm = nn.BatchNorm2d(3), converted(nn.BatchNorm2d(3))
    got, want = norm(x), plain(x.float())
    assert got.dtype == dtype
    torch.testing.assert_close(got.float(), want, atol=0.02, rtol=0.01)
    torch.testing.assert_close(norm.running_mean, plain.running_mean)
    torch.testing.assert_close(norm.running_var, plain.running_var)


def test_norms_with_activations_inside() -> None:
    """On a GPU timm converts them; on a CPU the error names them."""
    model = timm.create_model("regnety_002", device="meta")
    with pytest.raises(ValueError, match=r"needs torch's BatchNorm1d, 2d or 3d, got BatchNormAct2d at stem\.bn"):
        SyncBatchNorms(on_cpu=True).apply(model)
    activations = sum(isinstance(module, nn.ReLU) for module in model.modules())
    shared = SyncBatchNorms(on_cpu=False).apply(model)
    assert sum(isinstance(module, nn.SyncBatchNorm) for module in shared.modules()) > 10
    assert sum(isinstance(module, nn.ReLU) for module in shared.modules()) == activations


@pytest.mark.parametrize(("on_cpu", "kind"), [(True, SyncBatchNorm), (False, nn.SyncBatchNorm)])
def test_norms_of_a_necks_generators_are_shared(on_cpu: bool, kind: type[nn.Module]) -> None:
    """And keep the rule of GeneratorBatchNorm2d: the running statistics, where a channel has a single value."""
    layer = involution_layer(32, "rednet26")
    assert norms_of_involutions(layer) == [layer.generator.norm]
    layer.generator.norm.running_mean.normal_()
    plain = copy.deepcopy(layer.generator.norm)
    before = layer.state_dict()
    norm = SyncBatchNorms(on_cpu).apply(layer).generator.norm
    assert isinstance(norm, kind)
    torch.testing.assert_close(layer.state_dict(), before)
    single, several = torch.randn(1, norm.num_features, 1, 1), torch.randn(2, norm.num_features, 3, 1)
    torch.testing.assert_close(norm(single), plain.eval()(single))
    torch.testing.assert_close(norm.state_dict(), plain.state_dict())
    torch.testing.assert_close(norm(several), plain.train()(several))
    assert not isinstance(SyncBatchNorms(on_cpu).apply(nn.Sequential(nn.BatchNorm2d(3)))[0], GeneratorBatchNorm2d)


def test_a_generators_norm_counts_the_values_of_all_processes(alone: None) -> None:
    """Two processes, of which one has no value, are tried by their sum: here the group has one process."""
    norm, plain = converted(GeneratorBatchNorm2d(3)), GeneratorBatchNorm2d(3)
    assert type(norm) is GeneratorSyncBatchNorm
    for _ in range(2):
        x = torch.randn(2, 3, 4, 4)
        torch.testing.assert_close(norm(x), plain(x))
        single = torch.randn(1, 3, 1, 1, requires_grad=True)
        torch.testing.assert_close(norm(single), plain(single))
        norm(single).sum().backward()
        torch.testing.assert_close(norm.state_dict(), plain.state_dict())


def test_a_batch_of_nothing_leaves_the_statistics(alone: None) -> None:
    """As in a detector's head without a region in any process."""
    norm = converted(nn.BatchNorm2d(3))
    norm(torch.randn(2, 3, 4, 4))
    before = {name: value.clone() for name, value in norm.state_dict().items()}
    x = torch.zeros(0, 3, 4, 4, requires_grad=True)
    y = norm(x)
    y.sum().backward()
    assert (y.shape, x.grad.shape) == (x.shape, x.shape)
    torch.testing.assert_close(norm.state_dict(), before)
    assert all(parameter.grad.abs().sum() == 0 for parameter in norm.parameters())
