"""The involutions of a network: which there are, their calls with kernel maps, and statistics of these."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..nn import Involution2d, LocalSelfAttention2d

Layer = Involution2d | LocalSelfAttention2d
Use = Callable[[str, Any, Tensor, Tensor, Tensor], None]


def involutions(model: nn.Module) -> dict[str, Layer]:
    """The Involution2d and LocalSelfAttention2d layers by their names in `model.named_modules()`, in that order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Layer)}


@contextmanager
def each_call(layers: Mapping[str, Layer], use: Use) -> Iterator[None]:
    """A context manager in which every call of the layers is reported.

    The kernel map is recomputed from the layer's input, because a fused layer does not store it.

    Args:
        layers: by name.
        use: called with name, layer, input [N, C, H, W], kernel map [N, G, Kh, Kw, Ho, Wo] (detached) and output. A
            call without images (a mask head without regions) is not reported.
    """

    def hook_of(name: str) -> Callable[..., None]:
        def hook(layer: Layer, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            x: Tensor = args[0] if args else kwargs["input"]
            if x.dim() == 3:
                x, output = x.unsqueeze(0), output.unsqueeze(0)
            if x.numel():
                with torch.no_grad():
                    kernel_map: Tensor = layer.generator(x)
                use(name, layer, x, kernel_map, output)

        return hook

    handles = [layer.register_forward_hook(hook_of(name), with_kwargs=True) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def select(names: Sequence[str], wanted: Sequence[str]) -> list[str]:
    """Layers by name or by index, in the order wanted, without repetitions.

    Raises:
        ValueError: a name or an index is not one of a layer; the message lists the names with their indices.
    """
    found: dict[str, None] = {}
    for one in wanted:
        if one in names:
            found[one] = None
        elif one.isdecimal() and int(one) < len(names):
            found[names[int(one)]] = None
        else:
            known = ", ".join(f"{index} {name}" for index, name in enumerate(names))
            raise ValueError(f"layers must be indices or names of involutions, got {one!r}; there are {known}")
    return list(found)


def last_of_stages(names: Sequence[str]) -> list[str]:
    """The last layer of every stage, and every element of a list of layers (the levels of a pyramid).

    A stage is what precedes the first number in a name: layer1 in layer1.0.conv2.
    """
    chosen: dict[str, str] = {}
    for name in names:
        stage, _, rest = re.sub(r"(^|\.)\d+(\.|$)", "|", name, count=1).partition("|")
        chosen[stage if rest else name] = name
    return sorted(chosen.values(), key=list(names).index)


class Statistics(NamedTuple):
    """Statistics of a kernel map over images, groups and positions.

    `sum` and `sum_spread` are mean and standard deviation of the kernels' sums, `spread` the standard deviation of the
    weights within a kernel (mean over kernels), `negative` the share of negative weights.
    """

    sum: float
    sum_spread: float
    spread: float
    negative: float

    @classmethod
    def of(cls, kernel_map: Tensor) -> "Statistics":
        """Of [N, G, Kh, Kw, Ho, Wo]."""
        sums, spread = kernel_map.sum((2, 3)), kernel_map.flatten(2, 3).std(2, correction=0)
        parts = sums.mean(), sums.std(correction=0), spread.mean(), (kernel_map < 0).float().mean()
        return cls(*(part.item() for part in parts))


class Call(NamedTuple):
    """One call of a layer.

    `number` counts the layer's calls from 0 (a detector's head runs once per level), `input_size` is height and width,
    `on_regions` whether the input is regions of interest instead of the image. The kernel map [G, Kh, Kw, Ho, Wo] and
    the output [C, Ho, Wo], of the first image, are those of chosen layers only.
    """

    name: str
    layer: Any
    number: int
    input_size: tuple[int, int]
    output_size: tuple[int, int]
    groups: int
    statistics: Statistics
    on_regions: bool
    kernel_map: Tensor | None
    output: Tensor | None

    @property
    def kernel(self) -> str:
        """Kernel size, with stride and dilation where they are not 1."""
        layer = self.layer
        text = "x".join(map(str, layer.kernel_size))
        for what in ("stride", "dilation"):
            if max(getattr(layer, what)) > 1:
                text += f" {what} {'x'.join(map(str, dict.fromkeys(getattr(layer, what))))}"
        return text


def table(calls: Sequence[Call], names: Sequence[str]) -> str:
    """The calls' statistics as lines of text; `names` are all layers, which gives their indices."""
    rows = [("", "layer", "kernel", "groups", "output", "sum of kernel", "spread", "negative")]
    for one in calls:
        values = one.statistics
        name = one.name if calls_of(calls, one) == 1 else f"{one.name}, call {one.number}"
        rows.append(
            (
                *(str(names.index(one.name)), name, one.kernel, str(one.groups)),
                "regions" if one.on_regions else "x".join(map(str, one.output_size)),
                f"{values.sum:.3g} +- {values.sum_spread:.3g}",
                *(f"{values.spread:.3g}", f"{values.negative:.0%}"),
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
    return "\n".join(lines)


def calls_of(calls: Sequence[Call], one: Call) -> int:
    """How many of the calls are the same layer's."""
    return sum(other.name == one.name for other in calls)
