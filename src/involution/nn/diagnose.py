"""Why a loss is NaN: what every involution of a network does to the signal, and what to do about it."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .signal import Gradients, Recorder, growth_of, is_finite, tensors_in

LARGE = 1e3  # an output's RMS over that of the first layer's input: exploding
SMALL = 1e-3  # an output's RMS over that of its own input: vanishing
GRADIENTS = 1e4  # the ratio of the first and the last layer's gradients that is too much, either way
LAGGING = 10.0  # an output's RMS in evaluation over that in training
QUADRATIC = 1.5  # a growth above it is no longer a convolution's
GENERATOR = "a kernel generator whose kernels do not grow with its input"  # Involution2d's default
REMEDY = f"have {GENERATOR} and begin near the identity, a norm behind the layer, or a smaller learning rate"


class LayerSignal(NamedTuple):
    """One involution. RMS values of its call with the largest output, in training unless only evaluation calls it.

    `taps` is mean and standard deviation of a kernel's sum; `gradient` is the RMS of the loss's gradient with respect
    to the layer's input and `generator_gradient` the norm of that of its generator's weights, None where there is none;
    `evaluation` is the output's RMS in evaluation, and `growth` the binary logarithm of its growth there when the
    layer's input is doubled: 1 is a convolution's.
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
    """What `diagnose` found.

    `layers` are in the order of their calls; `loss` is in training; `growth` is the whole network's in evaluation, None
    where its output is not finite or a list of detections; `problems` say what is wrong and what to do, `notes` what
    may be as it should.
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
        lines.append(f"loss in training {_number(self.loss)}, growth of the whole network {_number(self.growth)}")
        lines += self.problems or ["healthy: signal and gradients keep their size"]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def _table(layers: list[LayerSignal]) -> list[str]:
    rows = [("layer", "input", "kernel", "output", "sum of taps", "gradient", "generator", "evaluation", "growth")]
    for one in layers:
        taps = f"{_number(one.taps[0])} +- {_number(one.taps[1])}"
        forward = (_number(one.input), _number(one.kernel), _number(one.output), taps)
        backward = (_number(one.gradient), _number(one.generator_gradient))
        rows.append((one.name, *forward, *backward, _number(one.evaluation), _number(one.growth)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "RMS of input, kernel map and output; mean and spread of a kernel's sum; RMS of the gradient at the input, and",
        "norm of the generator's; RMS of the output in evaluation, and the power of its input that it grows with there",
        *("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows),
    ]


def diagnose(model: nn.Module, batch: Any, loss: Callable[[Any], Tensor] | None = None) -> Diagnosis:
    """Sends a batch through a network, in training and in evaluation, and says what its involutions do to the signal.

    The model stays as it is: modes, parameters, gradients, running statistics, hooks, and torch's random numbers. It
    takes a training step's time and memory, and three forward passes. For training a model in evaluation mode is
    switched by `model.train()`; one in training keeps the modes of its parts.

    Args:
        model: any module; its involutions and layers of local self-attention are listed.
        batch: what the model is called with, on its device: a tuple holds its arguments, of which the first is doubled
            to measure growth. Batch norms may want more than one image.
        loss: of the model's output in training, for the gradients. None adds up an output of scalars (a detector's
            dictionary of losses), and takes the mean of the squares of any other.

    Returns:
        Every layer's values, and the verdict; its string is a table and the problems.

    Raises:
        TypeError: model is no module.
        ValueError: there is no loss, and the model returns no floating-point tensor.
        Exception: what the model raises.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    with torch.inference_mode(False), torch.enable_grad(), _kept(model):
        if not model.training:
            model.train()
        with Recorder(model) as training:
            value = (loss or _default_loss)(_run(model, batch))
        gradients = training.gradients(value)
    with torch.inference_mode(False), torch.no_grad(), _kept(model):
        model.eval()
        with Recorder(model, growth=True) as evaluation:
            output = _run(model, batch)
        growth = (
            None
            if _is_detections(output)
            else growth_of(list(tensors_in(output)), lambda: list(tensors_in(_run(model, _doubled(batch)))))
        )
    layers = _layers(training, gradients, evaluation)
    problems = _broken_values(model, batch)  # of which all else is a consequence
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
    """Of the batch, and of parameters."""
    problems = []
    if not is_finite(batch):
        problems.append("non-finite batch: it holds NaN or infinity: look at the data and their normalisation")
    parameters = [name for name, one in model.named_parameters() if not is_finite(one)]
    if parameters:
        problems.append(
            f"non-finite parameters: {_some(parameters)}: resume from the last good checkpoint, with a smaller "
            "learning rate, a longer warm-up or clipped gradients"
        )
    return problems


def _broken_statistics(model: nn.Module) -> list[str]:
    """A training pass whose activations are not finite leaves them behind."""
    broken = [name for name, one in model.named_buffers() if name.endswith(("_mean", "_var")) and not is_finite(one)]
    if not broken:
        return []
    return [f"non-finite running statistics: {_some(broken)}: they never recover: resume from the last good checkpoint"]


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
            f"have {GENERATOR}, or train a few more steps before evaluating"
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
                f"exploding in {where}: the output of {one.name} has RMS {_number(size)}, where the input of "
                f"{first.name} has {_number(first.input)}: {REMEDY}"
            )
    vanished = [one for one in layers if 0 < one.output < SMALL * one.input]
    if vanished:
        one = vanished[0]
        problems.append(
            f"vanishing: {_some([one.name for one in vanished])}: the first makes RMS {_number(one.output)} of "
            f"{_number(one.input)}: begin near the identity, or have a norm behind the layer"
        )
    lagging = [one for one in layers if one.evaluation is not None and LAGGING * one.output < one.evaluation < math.inf]
    if lagging and not problems:
        one = lagging[0]
        problems.append(
            f"evaluation far from training: the output of {one.name} has RMS {_number(one.evaluation)} and "
            f"{_number(one.output)}: running statistics lag behind: train a few more steps before evaluating"
        )
    return problems


def _gradient_sizes(layers: list[LayerSignal]) -> list[str]:
    reached = [(one.name, one.gradient) for one in layers if one.gradient and math.isfinite(one.gradient)]
    if not reached:
        return []
    (first, large), (last, small) = reached[0], reached[-1]
    sizes = f"RMS {_number(large)} at the input of {first}, {_number(small)} at that of {last}"
    if large > GRADIENTS * small:
        return [f"exploding gradients: {sizes}: {REMEDY}; clipping does not mend the forward pass"]
    if small > GRADIENTS * large:
        return [f"vanishing gradients: {sizes}: have norms or shortcuts between the layers, or begin near the identity"]
    return []


def _dead(training: Recorder, gradients: dict[str, Gradients]) -> list[str]:
    nothing = Gradients(None, None, False)
    dead = []
    for name, call in training.calls.items():
        back = gradients.get(name, nothing)
        if call.kernel == 0 or (call.constant and back.generator == 0 and back.arrives):
            dead.append(name)
    if not dead:
        return []
    return [
        f"dead generator: {_some(dead)}: kernels are zero, or the same everywhere while the generator's weights get no "
        "gradient: initialise these generators again, and train with a smaller learning rate"
    ]


def _growing(growth: float | None) -> list[str]:
    if growth is None or growth <= QUADRATIC:
        return []
    size = "overflow" if growth == math.inf else f"grow by 2^{_number(growth)}"
    return [
        f"growing: doubling the input makes the network's output in evaluation {size}, where a convolutional network's "
        f"doubles: have {GENERATOR}"
    ]


def _notes(layers: list[LayerSignal], gradients: dict[str, Gradients]) -> list[str]:
    notes = []
    fast = [one.growth for one in layers if one.growth is not None and one.growth > QUADRATIC]
    if fast:
        notes.append(
            f"{len(fast)} of {len(layers)} layers grow with their input to the power of {_number(max(fast))} in "
            "evaluation: their kernels grow with the features that they are made from"
        )
    idle = [name for name, back in gradients.items() if not back.arrives]
    if idle:
        notes.append(
            f"no gradient reaches {_some(idle)}: right in the first step of blocks that begin as their shortcut "
            "(zero_init_last), wrong later"
        )
    return notes


@contextmanager
def _kept(model: nn.Module) -> Iterator[None]:
    """Restores modes, buffers and torch's generators of random numbers."""
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
    """A dictionary for every image, as torchvision's detectors return: boxes do not grow with the image's values."""
    return isinstance(output, list) and bool(output) and isinstance(output[0], dict)


def _default_loss(output: Any) -> Tensor:
    parts = list(tensors_in(output))
    if not parts:
        raise ValueError(f"loss must be given for a model without a floating-point output, got {type(output).__name__}")
    losses = all(one.dim() == 0 for one in parts)
    return torch.stack([one if losses else one.float().square().mean() for one in parts]).sum()


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
