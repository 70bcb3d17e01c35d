"""Members of the involution family with the same window: other kernel generators, and local self-attention."""

from collections.abc import Sequence
from functools import partial
from statistics import median

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..nn import (
    ContextGenerator,
    Involution2d,
    LinearGenerator,
    LocalSelfAttention2d,
    PositionGenerator,
    SoftmaxGenerator,
)
from .cases import NECK, Case
from .registry import Workload, subject
from .timer import Rivals, Row, interleaved, quartiles, spread

GENERATORS = {
    "bottleneck": None,
    "single linear": LinearGenerator,
    "spatial context": ContextGenerator,
    "position only": PositionGenerator,
    "normalised": SoftmaxGenerator,
}


@subject("family", ("workloads", "seconds"))
def family(workloads: Sequence[Workload], seconds: float) -> list[Row]:
    """Forward, and forward + backward, of every member, interleaved, and of torch's attention over the whole image."""
    rows = []
    for case, batch in workloads:
        if case is NECK:  # attention over the whole image does not fit into memory
            continue
        members = _members(case)
        x, _, g = case.tensors(batch)
        calls: dict[str, Rivals] = {
            "forward": {name: partial(_forward, member, x.detach()) for name, member in members.items()},
            "forward + backward": {name: partial(_both, member, x, g) for name, member in members.items()},
        }
        for what, some in calls.items():
            times = interleaved(some, 5 * seconds)
            ours = median(times["bottleneck"])
            for name, taken in times.items():
                row: Row = {"what": f"{name}, {what}", "case": case.name, "batch": batch, "ms": spread(taken)}
                rows.append(row | {"quartiles, ms": {name: quartiles(taken)}, "x": median(taken) / ours})
    return rows


def _members(case: Case) -> dict[str, nn.Module]:
    window = (case.channels, case.kernel_size, case.stride)
    members: dict[str, nn.Module] = {
        name: Involution2d(*window, kernel_generator=generator) for name, generator in GENERATORS.items()
    }
    for kind in ("none", "bias", "factorised"):
        attention = LocalSelfAttention2d(*window, heads=case.groups, relative_position=kind)
        members[f"local self-attention, {kind}"] = attention
    members["full self-attention, torch's"] = _Full(LocalSelfAttention2d(*window, heads=case.groups))
    return {name: member.to(memory_format=torch.channels_last) for name, member in members.items()}


class _Full(nn.Module):
    """Self-attention over the whole image, with the same projections."""

    def __init__(self, local: LocalSelfAttention2d) -> None:
        super().__init__()
        self.local = local

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C, ceil(H / stride), ceil(W / stride)]."""
        generator = self.local.generator
        query, key, value = (
            one.unflatten(1, (self.local.heads, -1)).flatten(3).transpose(2, 3)
            for one in (generator.query(x), generator.key(x), self.local.value(x))
        )
        sizes = [-(-size // step) for size, step in zip(x.shape[2:], self.local.stride, strict=True)]
        found = F.scaled_dot_product_attention(query, key, value)
        return found.transpose(2, 3).flatten(1, 2).unflatten(2, sizes)


@torch.no_grad()
def _forward(member: nn.Module, x: Tensor) -> Tensor:
    member.eval()
    result: Tensor = member(x)
    return result


def _both(member: nn.Module, x: Tensor, g: Tensor) -> tuple[Tensor, ...]:
    member.train()
    return torch.autograd.grad(member(x), (x, *member.parameters()), g)
