"""Signal propagation: the RMS of activations and gradients at every involution, recorded by forward hooks."""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .attention import LocalSelfAttention1d, LocalSelfAttention2d, LocalSelfAttention3d
from .involution import Involution1d, Involution2d, Involution3d

LAYERS = (
    *(Involution1d, Involution2d, Involution3d),
    *(LocalSelfAttention1d, LocalSelfAttention2d, LocalSelfAttention3d),
)


class Call(NamedTuple):
    """One call of a layer: RMS of input, kernel map and output.

    `taps` is mean and standard deviation of the kernels' sums; `constant` is True if all positions of all images have
    the same kernels; `growth` is log2 of the output's growth when the layer's input is doubled (1 for a convolution),
    None if not measured; `tensors` are input and output.
    """

    layer: Any
    input: float
    kernel: float
    taps: tuple[float, float]
    constant: bool
    output: float
    growth: float | None
    tensors: tuple[Tensor, Tensor]


class Gradients(NamedTuple):
    """Gradients of a loss at one layer: RMS at its input, norm over its generator's weights, None without a gradient.

    `arrives` is whether the gradient at the layer's output is nonzero.
    """

    input: float | None
    generator: float | None
    arrives: bool


class Recorder:
    """A context manager that records the calls of a network's layers.

    `calls` has one call per layer, in the order of execution; of several calls of a layer, that with the largest
    output. `culprit` is the first module that returned NaN or infinity for finite inputs.

    Args:
        model: to record.
        growth: measure every layer's growth, which runs it once more.
    """

    def __init__(self, model: nn.Module, growth: bool = False) -> None:
        self.model, self.growth = model, growth
        self.calls: dict[str, Call] = {}
        self.culprit: str | None = None
        self._measuring = False
        self._handles: list[Any] = []

    def __enter__(self) -> "Recorder":
        for name, module in self.model.named_modules():
            if isinstance(module, LAYERS) or not any(True for _ in module.children()):
                hook = self._hook(name or "the model")
                self._handles.append(module.register_forward_hook(hook, with_kwargs=True))
        return self

    def __exit__(self, *_: Any) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if self._measuring:
                return
            if self.culprit is None and not is_finite(output) and is_finite((args, kwargs)):
                self.culprit = f"{name} ({type(module).__name__})"
            if isinstance(module, LAYERS) and output.numel():  # empty for a mask head without regions
                self._measuring = True  # the generator and the layer run again
                try:
                    call = _measured(module, args[0] if args else kwargs["input"], output, self.growth)
                finally:
                    self._measuring = False
                if name not in self.calls or not call.output <= self.calls[name].output:
                    self.calls[name] = call

        return hook

    def gradients(self, loss: Tensor) -> dict[str, Gradients]:
        """The gradients of a loss at every layer, empty if it has none; parameters' `.grad` do not change."""
        weights = {name: _weights(call.layer.generator) for name, call in self.calls.items()}
        wanted = {
            id(one): one
            for name, call in self.calls.items()
            for one in (*call.tensors, *weights[name])
            if one.requires_grad
        }
        if not loss.requires_grad or not wanted:
            return {}
        made = dict(zip(wanted, torch.autograd.grad(loss, list(wanted.values()), allow_unused=True), strict=True))
        found = {}
        for name, call in self.calls.items():
            at_input, at_output = (made.get(id(one)) for one in call.tensors)
            some = [one for one in (made.get(id(weight)) for weight in weights[name]) if one is not None]
            found[name] = Gradients(
                None if at_input is None else rms(at_input),
                math.sqrt(sum(rms(one) ** 2 * one.numel() for one in some)) if some else None,
                at_output is not None and bool(at_output.any()),
            )
        return found


def _weights(generator: nn.Module) -> list[Tensor]:
    """All but biases: the last bias gets a gradient even if all of the generator's activations are zero."""
    return [one for one in generator.parameters() if one.requires_grad and one.dim() > 1]


@torch.no_grad()
def _measured(layer: Any, x: Tensor, y: Tensor, growth: bool) -> Call:
    """Measures a call. Recomputes the kernel map, which a layer without gradients does not store."""
    kernels: Tensor = layer.generator(x if x.dim() == layer.dims + 2 else x.unsqueeze(0))
    kernels = kernels.flatten(2, 1 + layer.dims).flatten(3).float()  # [N, G, taps, positions]
    sums = kernels.sum(2)
    return Call(
        layer=layer,
        input=rms(x),
        kernel=rms(kernels),
        taps=(sums.mean().item(), sums.std(correction=0).item()),
        constant=bool((kernels == kernels[:1, :, :, :1]).all()),
        output=rms(y),
        growth=growth_of([y], lambda: [layer.forward(2 * x)]) if growth else None,
        tensors=(x, y),
    )


def growth_of(before: list[Tensor], after: Callable[[], list[Tensor]]) -> float | None:
    """log2 of the ratio of RMS values: infinity if only the second overflows, None if the first does or is 0."""
    first = rms(*before)
    if first == 0 or not math.isfinite(first):
        return None
    second = rms(*after())
    if not math.isfinite(second):
        return math.inf
    return math.log2(second / first) if second else -math.inf


@torch.no_grad()
def rms(*tensors: Tensor) -> float:
    """The RMS over all elements, scaled by the largest so that no square overflows; 0 without elements."""
    parts = [one.detach().flatten() for one in tensors if one.numel()]
    if not parts:
        return 0.0
    values = torch.cat([one if one.dtype == torch.float64 else one.float() for one in parts])
    largest = values.abs().max().item()
    if largest == 0 or not math.isfinite(largest):
        return largest
    return largest * (values / largest).square().mean().sqrt().item()


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The floating-point tensors in nested lists, tuples and dictionaries."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, dict):
        for one in value.values():
            yield from tensors_in(one)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from tensors_in(one)


def is_finite(value: Any) -> bool:
    """Whether no tensor in it holds NaN or infinity."""
    return all(bool(one.isfinite().all()) for one in tensors_in(value))
