"""Batch norm over the images of all processes: torch's on GPUs, and one for CPUs, which torch's refuses."""

from collections.abc import Collection
from itertools import pairwise
from typing import Any

import torch
from lightning.pytorch.plugins.layer_sync import LayerSync
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn
from torch.distributed import all_reduce, is_initialized

from ..nn import Involution2d
from ..zoo.fpn import GeneratorBatchNorm2d
from .module import TaskModule

_PLAIN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, GeneratorBatchNorm2d)


class _OverProcesses(torch.autograd.Function):
    """The sum of all processes' tensors. Every process's result depends on every tensor: gradients are summed, too."""

    @staticmethod
    def forward(ctx: Any, own: Tensor) -> Tensor:
        total = own.clone()
        all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        total = grads[0].clone()
        all_reduce(total)
        return total


class SyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm whose statistics in training are those of all processes' images, in float32 at least."""

    def forward(self, input: Tensor) -> Tensor:
        """[N, C, ...] -> the same, normalised over the N of all processes and the positions.

        Running statistics stay where no process has a value.
        """
        if not (self.training and is_initialized()):
            return super().forward(input)
        axes = [axis for axis in range(input.dim()) if axis != 1]
        shape = [1, -1] + [1] * (input.dim() - 2)
        x = input.to(torch.promote_types(input.dtype, torch.float32))
        own = torch.tensor([x.numel() / x.shape[1]], dtype=x.dtype, device=x.device)
        sums: Tensor = _OverProcesses.apply(torch.cat([x.sum(axes), own]))
        count = sums[-1].detach().clamp(min=1)
        mean = sums[:-1] / count
        centred = x - mean.view(shape)
        variance: Tensor = _OverProcesses.apply(centred.square().sum(axes)) / count
        if sums[-1] > 0:
            self._follow(mean.detach(), variance.detach() * count / (count - 1).clamp(min=1))
        normal = centred * (variance + self.eps).rsqrt().view(shape)
        result = normal * self.weight.view(shape) + self.bias.view(shape) if self.affine else normal
        return result.to(input.dtype)

    def _check_input_dim(self, input: Tensor) -> None:
        """Any number of axes."""

    def _follow(self, mean: Tensor, variance: Tensor) -> None:
        """Moves the running statistics towards those of a batch."""
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        step = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), step)
        self.running_var.lerp_(variance.to(self.running_var.dtype), step)


def norms_of_involutions(model: nn.Module) -> list[nn.Module]:
    """Those that stay plain in the paper's segmenters: kernel generators' own, and the stem's after its involution."""
    found = [part for module in model.modules() if isinstance(module, Involution2d) for part in module.modules()]
    chains = [pairwise(module) for module in model.modules() if isinstance(module, nn.Sequential)]
    found += [after for chain in chains for before, after in chain if isinstance(before, Involution2d)]
    return [module for module in found if isinstance(module, nn.modules.batchnorm._BatchNorm)]


def synchronised(model: nn.Module, plain: Collection[nn.Module] = ()) -> nn.Module:
    """The network with torch's SyncBatchNorm for its batch norms, but for those in `plain`; parameters are shared."""
    kept = {name: module for name, module in model.named_modules() if module in plain}
    converted: nn.Module = convert_sync_batchnorm(model)
    for name, module in kept.items():
        converted.set_submodule(name, module)
    return converted


class SyncBatchNorms(LayerSync):
    """What `--trainer.sync_batchnorm true` means: the network's batch norms share their statistics.

    Those that a Lightning module names in `plain_norms` do not.

    Args:
        on_cpu: where the network will be; when norms are converted, it is not there yet.
    """

    def __init__(self, on_cpu: bool) -> None:
        self.on_cpu = on_cpu

    def apply(self, model: nn.Module) -> nn.Module:
        """Converts the batch norms; parameters and statistics stay.

        Raises:
            ValueError: on a CPU, a batch norm is of a class of its own, such as timm's BatchNormAct2d.
        """
        plain = model.plain_norms() if isinstance(model, TaskModule) else []
        if not self.on_cpu:
            return synchronised(model, plain)
        for name, module in model.named_modules():
            if module in plain:
                continue
            if type(module) in _PLAIN:
                module.__class__ = SyncBatchNorm
            elif isinstance(module, nn.modules.batchnorm._BatchNorm) and type(module) is not SyncBatchNorm:
                kind = type(module).__name__
                raise ValueError(f"sync_batchnorm on a CPU wants torch's BatchNorm1d, 2d or 3d, got {kind} at {name}")
        return model

    def revert(self, model: nn.Module) -> nn.Module:
        """Leaves them: outside of training they do what batch norms do."""
        return model
