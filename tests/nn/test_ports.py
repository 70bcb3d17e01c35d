"""Other implementations' layers, written once more from their definitions: docs/migration.md loads their weights."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from involution import Involution2d

CHANNELS, GROUPS, KERNEL = 32, 2, 5
PAGE = Path(__file__).parents[2] / "docs" / "migration.md"


def load_port() -> Any:
    """The page's function."""
    [block] = [one for one in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL) if "def load_port" in one]
    names: dict[str, Any] = {}
    exec(block[: block.index("\nlayer = ")], names)
    return names["load_port"]


class Port(nn.Module):
    """A layer whose parts have a port's names: reduction, norm, ReLU, span, and the sum over unfolded windows."""

    def __init__(self, reduce: str, norm: str, span: str, bias: bool, groups_last: bool = False) -> None:
        super().__init__()
        self.names, self.groups_last = (reduce, norm, span), groups_last
        width, taps = CHANNELS // 4, KERNEL**2
        for name, part in zip(
            self.names,
            (
                nn.Conv2d(CHANNELS, width, 1, bias=bias),
                nn.BatchNorm2d(width),
                nn.Conv2d(width, GROUPS * taps, 1, bias=bias),
            ),
            strict=True,
        ):
            *parents, last = name.split(".")
            holder: nn.Module = self
            for parent in parents:
                if parent not in dict(holder.named_children()):
                    holder.add_module(parent, nn.Module())
                holder = holder.get_submodule(parent)
            holder.add_module(last, part)

    def forward(self, x: Tensor) -> Tensor:
        reduce, norm, span = (self.get_submodule(name) for name in self.names)
        n, c, h, w = x.shape
        kernels = span(F.relu(norm(reduce(x))))
        if self.groups_last:
            kernels = kernels.unflatten(1, (-1, GROUPS)).transpose(1, 2)
        else:
            kernels = kernels.unflatten(1, (GROUPS, -1))
        windows = F.unfold(x, KERNEL, padding=KERNEL // 2).view(n, GROUPS, c // GROUPS, KERNEL**2, h, w)
        return (windows * kernels.unsqueeze(2)).sum(3).flatten(1, 2)


PORTS = {
    "official": Port("conv1.conv", "conv1.bn", "conv2.conv", bias=True),
    "ChristophReich1996": Port("reduce_mapping", "sigma_mapping.0", "span_mapping", bias=False),
    "shuuchen": Port("reduce.0", "reduce.1", "span", bias=True, groups_last=True),
    "External-Attention": Port("conv1", "bn", "conv2", bias=True),
}


@pytest.mark.parametrize("name", PORTS)
@pytest.mark.parametrize("training", [True, False])
def test_a_ports_weights_give_its_outputs(name: str, training: bool) -> None:
    torch.manual_seed(0)
    theirs = PORTS[name].double()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)
    statistics = dict(theirs.named_buffers())
    for key, values in statistics.items():
        if key.endswith("running_mean"):
            nn.init.normal_(values)
        elif key.endswith("running_var"):
            nn.init.uniform_(values, 0.5, 2)
    layer = Involution2d(CHANNELS, KERNEL, norm_layer=nn.BatchNorm2d, dtype=torch.float64)
    load_port()(layer, theirs.state_dict(), name)
    x = torch.randn(2, CHANNELS, 7, 9, dtype=torch.float64)
    torch.testing.assert_close(layer.train(training)(x), theirs.train(training)(x))
