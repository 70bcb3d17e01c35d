"""Batch norm over the images of all processes: torch's on GPUs, our own on CPUs, which torch's does not support."""

from collections.abc import Collection
from itertools import pairwise
from typing import Any

import torch
from lightning.pytorch.plugins.layer_sync import LayerSync
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn
from torch.distributed import all_reduce, get_world_size, is_initialized
from torch.nn import functional as F

from ..nn import Involution2d
from ..zoo.fpn import GeneratorBatchNorm2d
from .module import TaskModule


class _OverProcesses(torch.autograd.Function):
    """The sum of all processes' tensors; backward sums the gradients of all processes' results."""

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
    """Batch norm whose training statistics are those of the images of all processes, in float32 or wider."""

    single_value_rule = False  # use the running statistics where all processes have one value per channel

    def forward(self, input: Tensor) -> Tensor:
        """[N, C, ...] -> the same shape, normalised over N and positions of all processes.

        Running statistics are not updated where no process has a value.
        """
        if not (self.training and is_initialized()):
            return super().forward(input)
        axes = [axis for axis in range(input.dim()) if axis != 1]
        shape = [1, -1] + [1] * (input.dim() - 2)
        x = input.to(torch.promote_types(input.dtype, torch.float32))
        own = torch.tensor([x.numel() / x.shape[1]], dtype=x.dtype, device=x.device)
        sums: Tensor = _OverProcesses.apply(torch.cat([x.sum(axes), own]))
        if sums[-1] == 1 and self.single_value_rule:  # the same in all processes, so none waits for another
            return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        count = sums[-1].detach().clamp(min=1)
        mean = sums[:-1] / count
        centred = x - mean.view(shape)
        variance: Tensor = _OverProcesses.apply(centred.square().sum(axes)) / count
        if sums[-1] > 0:
            self._update(mean.detach(), variance.detach() * count / (count - 1).clamp(min=1))
        normal = centred * (variance + self.eps).rsqrt().view(shape)
        result = normal * self.weight.view(shape) + self.bias.view(shape) if self.affine else normal
        return result.to(input.dtype)

    def _check_input_dim(self, input: Tensor) -> None:
        """Accepts any number of axes."""

    def _update(self, mean: Tensor, variance: Tensor) -> None:
        """Moves the running statistics towards those of a batch."""
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        step = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), step)
        self.running_var.lerp_(variance.to(self.running_var.dtype), step)


class GeneratorSyncBatchNorm(GeneratorBatchNorm2d, SyncBatchNorm):
    """`SyncBatchNorm` with `GeneratorBatchNorm2d`'s rule where all processes together have one value per channel."""

    single_value_rule = True

    def forward(self, input: Tensor) -> Tensor:
        """[N, C, H, W] -> the same shape."""
        distributed = self.training and is_initialized()
        return SyncBatchNorm.forward(self, input) if distributed else super().forward(input)


class GeneratorSyncBatchNormGPU(GeneratorBatchNorm2d, nn.SyncBatchNorm):
    """torch's SyncBatchNorm with `GeneratorBatchNorm2d`'s rule for a single value per channel.

    Two processes have at least two values, so the rule matters only for a group of one process.
    """

    def forward(self, input: Tensor) -> Tensor:
        """[N, C, H, W] -> the same shape."""
        distributed = is_initialized() and get_world_size() > 1
        return nn.SyncBatchNorm.forward(self, input) if distributed else super().forward(input)


def norms_of_involutions(model: nn.Module) -> list[nn.Module]:
    """The batch norms that the paper's segmenters do not synchronise: generators', and the one after the stem's."""
    found = [part for module in model.modules() if isinstance(module, Involution2d) for part in module.modules()]
    chains = [pairwise(module) for module in model.modules() if isinstance(module, nn.Sequential)]
    found += [after for chain in chains for before, after in chain if isinstance(before, Involution2d)]
    return [module for module in found if isinstance(module, nn.modules.batchnorm._BatchNorm)]


def synchronised(model: nn.Module, plain: Collection[nn.Module] = ()) -> nn.Module:
    """The network with torch's SyncBatchNorm in place of batch norms not in `plain`; parameters are shared."""
    kept = {name: module for name, module in model.named_modules() if module in plain}
    generators = [name for name, module in model.named_modules() if type(module) is GeneratorBatchNorm2d]
    converted: nn.Module = convert_sync_batchnorm(model)
    for name in generators:
        converted.get_submodule(name).__class__ = GeneratorSyncBatchNormGPU
    for name, module in kept.items():
        converted.set_submodule(name, module)
    return converted


_SHARED: dict[type, type] = {
    nn.BatchNorm1d: SyncBatchNorm,
    nn.BatchNorm2d: SyncBatchNorm,
    nn.BatchNorm3d: SyncBatchNorm,
    GeneratorBatchNorm2d: GeneratorSyncBatchNorm,
}


class SyncBatchNorms(LayerSync):
    """Implements `--trainer.sync_batchnorm true`: the network's batch norms share their statistics.

    Those that the Lightning module lists in `plain_norms` do not.

    Args:
        on_cpu: whether the network will run on a CPU; norms are converted before it is moved to its device.
    """

    def __init__(self, on_cpu: bool) -> None:
        self.on_cpu = on_cpu

    def apply(self, model: nn.Module) -> nn.Module:
        """Converts the batch norms; parameters and statistics are kept.

        Raises:
            ValueError: on a CPU, a batch norm is of another class than torch's, such as timm's BatchNormAct2d.
        """
        plain = model.plain_norms() if isinstance(model, TaskModule) else []
        if not self.on_cpu:
            return synchronised(model, plain)
        for name, module in model.named_modules():
            if module in plain:
                continue
            if type(module) in _SHARED:
                module.__class__ = _SHARED[type(module)]
            elif isinstance(module, nn.modules.batchnorm._BatchNorm) and type(module) not in _SHARED.values():
                kind = type(module).__name__
                raise ValueError(f"sync_batchnorm on a CPU needs torch's BatchNorm1d, 2d or 3d, got {kind} at {name}")
        return model

    def revert(self, model: nn.Module) -> nn.Module:
        """Returns the model unchanged: in evaluation these norms are batch norms."""
        return model
