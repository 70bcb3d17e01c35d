"""Diagnosis of NaN losses: signal and gradient sizes at every involution, thresholds on them, and remedies."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .signal import Gradients, Recorder, growth_of, is_finite, tensors_in

LARGE = 1e3  # exploding: an output's RMS over that of the first layer's input
SMALL = 1e-3  # vanishing: an output's RMS over that of its own input
GRADIENTS = 1e4  # exploding or vanishing: the ratio of the first and the last layer's gradients
LAGGING = 10.0  # stale statistics: an output's RMS in evaluation over that in training
QUADRATIC = 1.5  # growth: 1 is a convolution's, 2 that of kernels that grow with their input
GENERATOR = "a kernel generator whose kernels do not grow with its input"  # Involution2d's default
REMEDY = f"use {GENERATOR} and the identity initialisation, a norm after the layer, or a smaller learning rate"


class LayerSignal(NamedTuple):
    """The RMS values of one layer, of its call with the largest output; in training, unless only evaluation calls it.

    `taps` is mean and standard deviation of the kernels' sums. `gradient` is the RMS of the loss's gradient w.r.t. the
    layer's input, `generator_gradient` the norm of that w.r.t. its generator's weights; None without a gradient.
    `evaluation` is the output's RMS in evaluation, and `growth` log2 of its growth there when the layer's input is
    doubled: 1 for a convolution.
    """

    name: str
    input: float
    kernel: float
    output: float
    taps: tuple[float, float]
    gradient: float | None
    generator_gradient: float | None
    evaluation: float | None
    growth: float | None


class Diagnosis(NamedTuple):
    """The result of `diagnose`.

    `layers` are in the order of execution; `loss` is in training; `growth` is the whole network's in evaluation, None
    if its output is not finite or a list of detections; `problems` are findings with a remedy, `notes` observations
    that need not be a problem.
    """

    layers: list[LayerSignal]
    loss: float
    growth: float | None
    problems: list[str]
    notes: list[str]

    @property
    def healthy(self) -> bool:
        """Whether there is no problem."""
        return not self.problems

    def __str__(self) -> str:
        lines = _table(self.layers) if self.layers else ["no involution was called"]
        lines.append(f"loss in training {_format(self.loss)}, growth of the whole network {_format(self.growth)}")
        lines += self.problems or ["healthy: signal and gradients keep their size"]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def _table(layers: list[LayerSignal]) -> list[str]:
    rows = [("layer", "input", "kernel", "output", "sum of taps", "gradient", "generator", "evaluation", "growth")]
    for one in layers:
        taps = f"{_format(one.taps[0])} +- {_format(one.taps[1])}"
        forward = (_format(one.input), _format(one.kernel), _format(one.output), taps)
        backward = (_format(one.gradient), _format(one.generator_gradient))
        rows.append((one.name, *forward, *backward, _format(one.evaluation), _format(one.growth)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "RMS of input, kernel map and output; mean and spread of a kernel's sum; RMS of the gradient at the input, and",
        "norm of the generator's; RMS of the output in evaluation, and the power of its input that it grows with there",
        *("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows),
    ]


def diagnose(model: nn.Module, batch: Any, loss: Callable[[Any], Tensor] | None = None) -> Diagnosis:
    """Runs a batch through a network, in training and in evaluation, and reports what its involutions do to the signal.

    The model does not change: modes, parameters, gradients, running statistics, hooks, and torch's random state are
    restored. It takes a training step's time and memory, and three forward passes. A model in evaluation mode is
    switched to training by `model.train()`; one in training keeps the modes of its submodules.

    Args:
        model: any module; its involutions and local self-attention layers are listed.
        batch: the model's input, on its device; a tuple holds several arguments, of which the first is doubled to
            measure growth. Batch norms may need more than one image.
        loss: computes the loss from the model's output in training. None sums an output of scalars (a detector's
            dictionary of losses), and takes the mean square of any other output.

    Returns:
        Every layer's values, and the problems; its string is a report.

    Raises:
        TypeError: model is not a module.
        ValueError: no loss is given, and the model returns no floating-point tensor.
        Exception: whatever the model raises.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    with torch.inference_mode(False), torch.enable_grad(), _restored(model):
        if not model.training:
            model.train()
        with Recorder(model) as training:
            value = (loss or _default_loss)(_run(model, batch))
        gradients = training.gradients(value)
    with torch.inference_mode(False), torch.no_grad(), _restored(model):
        model.eval()
        with Recorder(model, growth=True) as evaluation:
            output = _run(model, batch)
        growth = (
            None
            if _is_detections(output)
            else growth_of(list(tensors_in(output)), lambda: list(tensors_in(_run(model, _doubled(batch)))))
        )
    layers = _layers(training, gradients, evaluation)
    problems = _broken_values(model, batch)  # everything else would follow from these
    if not problems:
        problems = [
            *_not_finite(value.item(), training.culprit, evaluation.culprit),
            *_broken_statistics(model),
            *_sizes(layers),
            *_gradient_sizes(layers),
            *_dead(training, gradients),
            *_growing(growth),
        ]
    notes = [] if problems and not layers else _notes(layers, gradients)
    return Diagnosis(layers, value.item(), growth, problems, notes)


def _layers(training: Recorder, gradients: dict[str, Gradients], evaluation: Recorder) -> list[LayerSignal]:
    layers = []
    for name, call in (evaluation.calls | training.calls).items():
        later, back = evaluation.calls.get(name), gradients.get(name)
        layers.append(
            LayerSignal(
                *(name, call.input, call.kernel, call.output, call.taps),
                *((back.input, back.generator) if back else (None, None)),
                *((later.output, later.growth) if later else (None, None)),
            )
        )
    return layers


def _broken_values(model: nn.Module, batch: Any) -> list[str]:
    """Non-finite values in the batch or the parameters."""
    problems = []
    if not is_finite(batch):
        problems.append("non-finite batch: it holds NaN or infinity: look at the data and their normalisation")
    parameters = [name for name, one in model.named_parameters() if not is_finite(one)]
    if parameters:
        problems.append(
            f"non-finite parameters: {_shorten(parameters)}: resume from the last good checkpoint, with a smaller "
            "learning rate, a longer warm-up or clipped gradients"
        )
    return problems


def _broken_statistics(model: nn.Module) -> list[str]:
    """Non-finite running statistics, which a training pass with non-finite activations causes."""
    broken = [name for name, one in model.named_buffers() if name.endswith(("_mean", "_var")) and not is_finite(one)]
    if not broken:
        return []
    return [
        f"non-finite running statistics: {_shorten(broken)}: they never recover: resume from the last good checkpoint"
    ]


def _not_finite(loss: float, in_training: str | None, in_evaluation: str | None) -> list[str]:
    if in_training:
        return [f"non-finite in training: {in_training} is the first that returns NaN or infinity: {REMEDY}"]
    problems = []
    if not math.isfinite(loss):
        problems.append(f"non-finite loss of a finite output ({loss}): look at the loss and at the targets")
    if in_evaluation:
        problems.append(
            f"non-finite in evaluation, but not in training: {in_evaluation} is the first that returns NaN or "
            "infinity: running statistics lag behind, and kernels that grow with their input make that an overflow: "
            f"use {GENERATOR}, or train a few more steps before evaluating"
        )
    return problems


def _sizes(layers: list[LayerSignal]) -> list[str]:
    problems: list[str] = []
    for where, sizes in (
        ("training", [one.output for one in layers]),
        ("evaluation", [one.evaluation or 0.0 for one in layers]),
    ):
        large = [
            (one, size) for one, size in zip(layers, sizes, strict=True) if LARGE * layers[0].input < size < math.inf
        ]
        if large and not problems:
            (one, size), first = large[0], layers[0]
            problems.append(
                f"exploding in {where}: the output of {one.name} has RMS {_format(size)}, where the input of "
                f"{first.name} has {_format(first.input)}: {REMEDY}"
            )
    vanished = [one for one in layers if 0 < one.output < SMALL * one.input]
    if vanished:
        one = vanished[0]
        problems.append(
            f"vanishing: {_shorten([one.name for one in vanished])}: the first turns RMS {_format(one.input)} into "
            f"{_format(one.output)}: initialise near the identity, or add a norm after the layer"
        )
    lagging = [one for one in layers if one.evaluation is not None and LAGGING * one.output < one.evaluation < math.inf]
    if lagging and not problems:
        one = lagging[0]
        problems.append(
            f"evaluation far from training: the output of {one.name} has RMS {_format(one.evaluation)} and "
            f"{_format(one.output)}: running statistics lag behind: train a few more steps before evaluating"
        )
    return problems


def _gradient_sizes(layers: list[LayerSignal]) -> list[str]:
    reached = [(one.name, one.gradient) for one in layers if one.gradient and math.isfinite(one.gradient)]
    if not reached:
        return []
    (first, large), (last, small) = reached[0], reached[-1]
    sizes = f"RMS {_format(large)} at the input of {first}, {_format(small)} at that of {last}"
    if large > GRADIENTS * small:
        return [f"exploding gradients: {sizes}: {REMEDY}; clipping does not fix the forward pass"]
    if small > GRADIENTS * large:
        return [
            f"vanishing gradients: {sizes}: add norms or shortcuts between the layers, or initialise near the identity"
        ]
    return []


def _dead(training: Recorder, gradients: dict[str, Gradients]) -> list[str]:
    none = Gradients(None, None, False)
    dead = []
    for name, call in training.calls.items():
        back = gradients.get(name, none)
        if call.kernel == 0 or (call.constant and back.generator == 0 and back.arrives):
            dead.append(name)
    if not dead:
        return []
    return [
        f"dead generator: {_shorten(dead)}: kernels are zero, or the same everywhere while the generator's weights get "
        "no gradient: reinitialise these generators, and train with a smaller learning rate"
    ]


def _growing(growth: float | None) -> list[str]:
    if growth is None or growth <= QUADRATIC:
        return []
    size = "overflow" if growth == math.inf else f"grow by 2^{_format(growth)}"
    return [
        f"growing: doubling the input makes the network's output in evaluation {size}, where a convolutional network's "
        f"doubles: use {GENERATOR}"
    ]


def _notes(layers: list[LayerSignal], gradients: dict[str, Gradients]) -> list[str]:
    notes = []
    fast = [one.growth for one in layers if one.growth is not None and one.growth > QUADRATIC]
    if fast:
        notes.append(
            f"{len(fast)} of {len(layers)} layers grow with their input to the power of {_format(max(fast))} in "
            "evaluation: their kernels grow with the features that they are generated from"
        )
    idle = [name for name, back in gradients.items() if not back.arrives]
    if idle:
        notes.append(
            f"no gradient reaches {_shorten(idle)}: expected in the first step of blocks that start as their shortcut "
            "(zero_init_last), a problem later"
        )
    return notes


@contextmanager
def _restored(model: nn.Module) -> Iterator[None]:
    """A context manager that restores modes, buffers and torch's random state."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(module, name, one) for module in model.modules() for name, one in module._buffers.items()]
    copies = [None if one is None else one.clone() for *_, one in buffers]
    devices = sorted({one.get_device() for one in model.parameters() if one.is_cuda})
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training
            with torch.no_grad():
                for (module, name, one), copy in zip(buffers, copies, strict=True):
                    module._buffers[name] = one if one is None or copy is None else one.copy_(copy)


def _run(model: nn.Module, batch: Any) -> Any:
    return model(*batch) if isinstance(batch, tuple) else model(batch)


def _doubled(batch: Any) -> Any:
    if isinstance(batch, tuple):
        return (_doubled(batch[0]), *batch[1:])
    if isinstance(batch, list):
        return [_doubled(one) for one in batch]
    if isinstance(batch, dict):
        return {name: _doubled(one) for name, one in batch.items()}
    return 2 * batch if isinstance(batch, Tensor) and batch.is_floating_point() else batch


def _is_detections(output: Any) -> bool:
    """Whether an output is torchvision's detections, a dictionary per image: boxes do not scale with pixel values."""
    return isinstance(output, list) and bool(output) and isinstance(output[0], dict)


def _default_loss(output: Any) -> Tensor:
    parts = list(tensors_in(output))
    if not parts:
        raise ValueError(f"loss must be given for a model without a floating-point output, got {type(output).__name__}")
    losses = all(one.dim() == 0 for one in parts)
    return torch.stack([one if losses else one.float().square().mean() for one in parts]).sum()


def _format(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _shorten(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
