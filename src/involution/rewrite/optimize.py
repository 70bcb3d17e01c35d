"""A copy of a network for inference: norms folded, blocks around involutions fused, the rest compiled by Inductor."""

import copy
import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch._inductor
import torch._inductor.config
from torch import Tensor, fx, nn

from .checks import check_inference
from .fusion import fuse

_log = logging.getLogger(__name__)


def optimize(model: nn.Module, example_input: Tensor) -> nn.Module:
    """Returns a faster copy of a model for inference.

    Batch norms are folded into the convolutions before them. Every involution with the default generator becomes one
    fused operator with its reduction, the norm and ReLU after it and, in a bottleneck, the 1x1 convolution and the
    shortcut after those (see fusion.py). Images are in channels_last. torch.compile generates the rest, with frozen
    weights. A model without involutions (a timm ResNet) gets all of this that applies.

    Args:
        model: in evaluation mode; it is copied, not changed. Later changes of its weights have no effect.
        example_input: one batch; the returned module is compiled for it. Other sizes work, and compile on first use.

    Returns:
        A module with the model's forward, without gradients. Its `unfused` lists what could not be fused, and why.

    Raises:
        TypeError: model is no module, or example_input no tensor.
        ValueError: the model, or a part of it, is in training mode.
    """
    check_inference(model, example_input, "model", "example_input")
    optimized = Optimized(model)
    optimized(example_input)
    return optimized


class Optimized(nn.Module):
    """What :func:`optimize` returns."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = copy.deepcopy(model).requires_grad_(False)
        for parameter in self.model.parameters():
            parameter.data = _channels_last(parameter.data)
        self.unfused: list[str] = []
        # The copy never changes, so no call needs to check its modules.
        options: dict[str, Any] = {"guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe}
        # Wrapped in a partial: as a submodule it would list every weight a second time.
        self._run = partial(torch.compile(self.model, backend=self._compile, options=options))
        self.train(False)

    def forward(self, *inputs: Any, **options: Any) -> Any:
        """The model's own."""
        inputs = tuple(_channels_last(value) for value in inputs)
        with torch.no_grad(), torch._inductor.config.patch(freezing=True):
            return self._run(*inputs, **options)

    def train(self, mode: bool = True) -> "Optimized":
        """Stays in evaluation mode: the weights are frozen."""
        if mode:
            raise ValueError("an optimized model cannot be trained: its weights are frozen")
        return super().train(False)

    def _compile(self, graph: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        """The TorchDynamo backend: fuses what matches, then calls Inductor."""
        for reason in fuse(graph):
            if reason not in self.unfused:
                self.unfused.append(reason)
                _log.warning("involution.optimize: %s", reason)
        graph = fx.GraphModule(graph, graph.graph)  # drops Dynamo's metadata, which does not know the folded weights
        graph.meta.pop("dynamo_compile_id", None)
        compiled: Callable[..., Any] = torch._inductor.compile(graph, inputs, options={"freezing": True})
        return compiled


def _channels_last(value: Any) -> Any:
    """A rank-4 tensor in channels_last memory; anything else unchanged."""
    return (
        value.contiguous(memory_format=torch.channels_last) if isinstance(value, Tensor) and value.dim() == 4 else value
    )
