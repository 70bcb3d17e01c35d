"""Batch norm over the images of all processes: torch's on GPUs, and one for CPUs, which torch's refuses."""

import torch
from lightning.pytorch.plugins.layer_sync import LayerSync
from torch import Tensor, nn
from torch.distributed import is_initialized
from torch.distributed.nn.functional import all_reduce

_PLAIN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class SyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm whose statistics in training are those of all processes' images; any device."""

    def forward(self, input: Tensor) -> Tensor:
        """[N, C, ...] -> the same, normalised over the N of all processes and the positions."""
        if not (self.training and is_initialized()):
            return super().forward(input)
        axes = [axis for axis in range(input.dim()) if axis != 1]
        shape = [1, -1] + [1] * (input.dim() - 2)
        own = torch.tensor([input.numel() / input.shape[1]], dtype=input.dtype, device=input.device)
        sums = all_reduce(torch.cat([input.sum(axes), own]))
        count = sums[-1].detach()
        mean = sums[:-1] / count
        centred = input - mean.view(shape)
        variance = all_reduce(centred.square().sum(axes)) / count
        self._follow(mean.detach(), variance.detach() * count / (count - 1).clamp(min=1))
        normal = centred * (variance + self.eps).rsqrt().view(shape)
        return normal * self.weight.view(shape) + self.bias.view(shape) if self.affine else normal

    def _check_input_dim(self, input: Tensor) -> None:
        """Any number of axes."""

    def _follow(self, mean: Tensor, variance: Tensor) -> None:
        """Moves the running statistics towards those of a batch."""
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        step = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, step)
        self.running_var.lerp_(variance, step)


class SyncBatchNorms(LayerSync):
    """What `--trainer.sync_batchnorm true` means: the network's batch norms share their statistics."""

    def apply(self, model: nn.Module) -> nn.Module:
        """Converts the batch norms; parameters and statistics stay."""
        if next(model.parameters()).device.type != "cpu":
            return nn.SyncBatchNorm.convert_sync_batchnorm(model)
        for module in model.modules():
            if type(module) in _PLAIN:
                module.__class__ = SyncBatchNorm
        return model

    def revert(self, model: nn.Module) -> nn.Module:
        """Leaves them: outside of training they are plain batch norms."""
        return model
