"""The paper's tables, row by row: what they print, and what the networks really cost."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import timm
from torch import nn

from .. import zoo
from .count import Cost, cost

assert zoo  # importing it registers RedNet
_IMAGE = (3, 224, 224)


class Row(NamedTuple):
    """One row: its name and what the paper prints, in millions of parameters and billions of multiply-adds.

    The paper's count mixes models: `counted` makes the one that it fits, of which the parts of `left_out` are not in
    the multiply-adds (but are in the parameters), and `model` the one of the released code.
    """

    name: str
    printed: tuple[float, float] | None
    model: Callable[[], nn.Module]
    counted: Callable[[], nn.Module]
    left_out: tuple[str, ...] = ()
    input_size: tuple[int, int, int] = _IMAGE


class Counted(NamedTuple):
    """A row's figures under every convention, as plain numbers."""

    row: str
    params_trainable: int
    counted: int
    honest: int
    mac: int


def _rednet(depth: int, millions: float, billions: float) -> Row:
    """Printed with a 7x7 stem and without the classifier; the released code has a 3x3 stem."""
    name = f"rednet{depth}"
    return Row(
        f"RedNet-{depth}",
        (millions, billions),
        lambda: timm.create_model(name),
        lambda: timm.create_model(name, stem_kernel_size=7),
        left_out=("fc",),
    )


def _resnet(depth: int, name: str) -> Row:
    return Row(f"ResNet-{depth}", None, lambda: timm.create_model(name), lambda: timm.create_model(name))


ROWS = (
    _rednet(26, 9.23, 1.73),
    _rednet(38, 12.39, 2.22),
    _rednet(50, 15.54, 2.71),
    _rednet(101, 25.65, 4.74),
    _rednet(152, 33.99, 6.79),
    _resnet(26, "resnet26_paper"),
    _resnet(38, "resnet38_paper"),
    _resnet(50, "resnet50"),
    _resnet(101, "resnet101"),
    _resnet(152, "resnet152"),
)


def count_row(row: Row) -> Counted:
    """Counts one row."""
    paper, released = cost(row.counted(), row.input_size), cost(row.model(), row.input_size)
    counted = sum(o.multiply_adds + o.others for o in paper.operations if o.module not in row.left_out)
    return Counted(row.name, paper.trainable, counted, released.honest, released.multiply_adds)


def count_rows(rows: Iterable[Row] = ROWS) -> list[Counted]:
    """Counts the rows."""
    return [count_row(row) for row in rows]


def disagreement(row: Row, counted: Counted) -> str:
    """What the paper's printed figures leave out or mix, or nothing where they are the released code's."""
    if row.printed is None:
        return ""
    reasons = []
    millions, billions = round(counted.params_trainable / 1e6, 2), round(counted.counted / 1e9, 2)
    if (millions, billions) != row.printed:
        reasons.append(f"counted {millions} M, {billions} G")
    if counted.counted != counted.honest:
        what = f"without {', '.join(row.left_out)}, " if row.left_out else ""
        reasons.append(f"printed {what}with another stem than the released code's {counted.honest / 1e9:.3f} G")
    return "; ".join(reasons)


def twin(name: str) -> str | None:
    """The convolution network that a RedNet of timm's registry is compared with."""
    if not name.startswith("rednet"):
        return None
    same = name.replace("rednet", "resnet")
    paper = f"{same}_paper"  # timm's own resnet26 has other depths
    return paper if timm.is_model(paper) else same if timm.is_model(same) else None


def cost_of(name: str, input_size: tuple[int, int, int] | None = None) -> tuple[Cost, tuple[int, int, int]]:
    """The cost of a network of timm's registry, at the input size that it is made for or another.

    Raises:
        ValueError: timm does not know the name.
    """
    if not timm.is_model(name):
        raise ValueError(f"model must be a name that timm.create_model takes or a row of --published, got {name!r}")
    model = timm.create_model(name)
    size = input_size or tuple(model.default_cfg["input_size"])
    return cost(model, size), size
