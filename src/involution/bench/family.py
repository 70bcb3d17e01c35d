"""Members of the involution family with the same window: other kernel generators, and local self-attention."""

from collections.abc import Sequence
from functools import cache, partial
from statistics import median

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

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

FLEX = "local self-attention, torch's flex_attention"


@subject("family", ("workloads", "seconds"))
def family(workloads: Sequence[Workload], seconds: float) -> list[Row]:
    """Forward, and forward + backward, of every member, interleaved, and of torch's two attentions."""
    rows = []
    for case, batch in workloads:
        if case is NECK:  # attention over the whole image does not fit into memory
            continue
        members = _members(case)
        x, _, g = case.tensors(batch)
        calls: dict[str, Rivals] = {
            "forward": {name: partial(_forward, member, x.detach()) for name, member in members.items()},
            # flex_attention has no gradient on CPUs.
            "forward + backward": {
                name: partial(_both, member, x, g) for name, member in members.items() if name != FLEX
            },
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
    members[FLEX] = FlexNeighbourhood(LocalSelfAttention2d(*window, heads=case.groups))
    return {name: member.to(memory_format=torch.channels_last) for name, member in members.items()}


class _Full(nn.Module):
    """Self-attention over the whole image, with the same projections."""

    def __init__(self, local: LocalSelfAttention2d) -> None:
        super().__init__()
        self.local = local

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C, ceil(H / stride), ceil(W / stride)]."""
        query, key, value = _heads(self.local, x)
        return _heads_joined(F.scaled_dot_product_attention(query, key, value), self.local, x)


class FlexNeighbourhood(nn.Module):
    """Local self-attention by torch's own means: flex_attention, compiled, with a mask of each query's window.

    Args:
        local: whose projections and window it takes.
    """

    def __init__(self, local: LocalSelfAttention2d) -> None:
        super().__init__()
        self.local = local
        self.attention = torch.compile(flex_attention, dynamic=False)
        self.mask = cache(self._mask)

    def _mask(self, height: int, width: int) -> BlockMask:
        (row_step, column_step), (rows, columns) = self.local.stride, self.local.kernel_size
        across = -(-width // column_step)

        def within(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            down = key // width - query // across * row_step
            right = key % width - query % across * column_step
            return (down.abs() <= rows // 2) & (right.abs() <= columns // 2)

        queries = -(-height // row_step) * across
        return create_block_mask(within, None, None, queries, height * width, device="cpu")

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C, ceil(H / stride), ceil(W / stride)]."""
        query, key, value = (one.contiguous() for one in _heads(self.local, x))
        found = self.attention(query, key, value, block_mask=self.mask(*x.shape[2:]))
        return _heads_joined(found, self.local, x)


def _heads(local: LocalSelfAttention2d, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values as [N, heads, positions, channels of a head]."""

    def by_head(projected: Tensor) -> Tensor:
        return projected.unflatten(1, (local.heads, -1)).flatten(3).transpose(2, 3)

    return by_head(local.generator.query(x)), by_head(local.generator.key(x)), by_head(local.value(x))


def _heads_joined(found: Tensor, local: LocalSelfAttention2d, x: Tensor) -> Tensor:
    """[N, heads, positions, channels of a head] -> [N, C, ceil(H / stride), ceil(W / stride)]."""
    sizes = [-(-size // step) for size, step in zip(x.shape[2:], local.stride, strict=True)]
    return found.transpose(2, 3).flatten(1, 2).unflatten(2, sizes)


@torch.no_grad()
def _forward(member: nn.Module, x: Tensor) -> Tensor:
    member.eval()
    result: Tensor = member(x)
    return result


def _both(member: nn.Module, x: Tensor, g: Tensor) -> tuple[Tensor, ...]:
    member.train()
    return torch.autograd.grad(member(x), (x, *member.parameters()), g)
