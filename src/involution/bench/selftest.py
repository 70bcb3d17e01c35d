"""`involution doctor --selftest`: do the backends of a device compute what the reference does, and how fast?"""

import argparse
import copy
import math
import statistics
import time
from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from itertools import count

import torch
from torch import Tensor

from ..ops.backends import selection, triton
from ..ops.functional import involution2d
from .baselines import Operator, unfold
from .random_calls import OPERATORS, Call, instruction_sets, random_call, using
from .timer import interleaved

_DTYPES = ("float32", "float64", "float16", "bfloat16")
_LIMIT, _INTERPRETED_LIMIT = 2_000_000, 20_000  # multiply-adds of a random call


def main(arguments: Sequence[str]) -> int:
    """Runs the command.

    Args:
        arguments: after the verb.

    Returns:
        The exit code: 0, 1 where a backend is wrong or nothing serves the device, 2 for a wrong call.
    """
    parser = argparse.ArgumentParser(
        prog="involution doctor --selftest",
        description="Compares every backend that serves a device with the reference in float64: random calls of all "
        "operators, forward and backward, and a training step; then times the operator against unfold.",
    )
    parser.add_argument("--selftest", action="store_true", required=True)
    parser.add_argument("--device", default=_default_device(), help="cpu, cuda, xpu, mps, ...; here %(default)s")
    parser.add_argument("--seconds", type=float, default=40, help="for random calls; default %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of the random calls; default %(default)s")
    parser.add_argument("--network", default="rednet26", help="that makes a training step; default %(default)s")
    try:
        given = parser.parse_args(arguments)
    except SystemExit as exit:
        return int(exit.code or 0)
    try:
        torch.empty(0, device=given.device)
    except (
        RuntimeError,
        AssertionError,
        NotImplementedError,
    ) as error:  # torch names an unknown device in several ways
        print(f"--device must be one that torch finds here, got {given.device}: {str(error).splitlines()[0]}")
        return 1
    failed = _report_calls(given.device, given.seconds, str(given.seed))
    wrong = _report_training_step(given.device, given.network)
    if not failed and not wrong:
        _report_speed(given.device)
        print("\nno backend differs from the reference")
        return 0
    print("\nFAILED: " + "; ".join([*wrong, *([f"{len(failed)} random calls"] if failed else [])]))
    if failed:
        call, reason = failed[0]
        print(f"the first of them ({reason}), as a line of Python:\n\n{call.line()}")
    return 1


def _default_device() -> str:
    found = torch.accelerator.current_accelerator(check_available=True)
    return "cpu" if found is None else found.type


def served(device: str) -> list[tuple[str, str, list[str]]]:
    """Every backend that runs on a device, once for each of its instruction sets: its name, the set, and the dtypes."""
    found: list[tuple[str, str, list[str]]] = []
    for name, module in selection._BACKENDS.items():
        dtypes = [dtype for dtype in _DTYPES if not _refuses(module, device, dtype)]
        sets = instruction_sets() if name == "cpu" else [""]
        found += [(name, one, dtypes) for one in sets if dtypes]
    return found


def _refuses(module: selection.BackendModule, device: str, dtype: str) -> str:
    try:
        empty = torch.empty(0, device=device, dtype=getattr(torch, dtype))
    except (TypeError, RuntimeError) as error:  # a dtype that the device does not have
        return str(error)
    return module.why_not(empty)


def _report_calls(device: str, seconds: float, seed: str) -> list[tuple[Call, str]]:
    """Compares random calls for some seconds, prints a table, and returns the calls that are wrong with the reasons."""
    backends = served(device)
    limit = _INTERPRETED_LIMIT if triton.interpreted() else _LIMIT
    kinds = [(name, one, dtype, op) for name, one, dtypes in backends for dtype in dtypes for op in OPERATORS]
    worst = dict.fromkeys(kinds, 0.0)
    calls, failed = dict.fromkeys(kinds, 0), []
    end = time.perf_counter() + seconds
    for number in count():
        if number and time.perf_counter() >= end:  # every kind at least once
            break
        for kind in kinds:
            name, instruction_set, dtype, op = kind
            call = random_call(op, name, instruction_set, device, dtype, f"{seed}/{number}/{op}", limit)
            error, reason = compare(call)
            worst[kind], calls[kind] = max(worst[kind], error), calls[kind] + 1
            if error > 1:
                failed.append((call, reason))
    print(f"\nrandom calls on {device}: the largest error relative to the bound of its rounding; above 1 is wrong")
    print(f"{'backend':16} {'operator':14} {'calls':>6}" + "".join(f"{dtype:>10}" for dtype in _DTYPES))
    for name, one, dtypes in backends:
        for op in OPERATORS:
            cells = [f"{worst[name, one, dtype, op]:10.2f}" if dtype in dtypes else f"{'-':>10}" for dtype in _DTYPES]
            made = sum(calls[name, one, dtype, op] for dtype in dtypes)
            print(f"{_label(name, one):16} {op:14} {made:6}" + "".join(cells))
    return failed


def compare(call: Call) -> tuple[float, str]:
    """A call's largest error relative to its bound, and its result's name or the exception's message."""
    try:
        errors = call.compare()
    except Exception as error:  # a kernel that does not compile or run: reported as a wrong call
        return math.inf, f"{type(error).__name__}: {error}"[:500]
    name = max(errors, key=lambda one: errors[one])
    return errors[name], f"{name} is {errors[name]:.3g} times its bound from the reference"


def _label(backend: str, instruction_set: str) -> str:
    return f"{backend} ({instruction_set})" if instruction_set else backend


def _report_training_step(device: str, network: str) -> list[str]:
    """A network's loss and gradients in float32 with every backend, against float64; returns what is wrong."""
    title = f"a training step of {network} in float32"
    if find_spec("timm") is None:
        print(f"\n{title}: left out, because timm is not installed")
        return []
    print(f"\n{title}: distances from float64, of the loss and of all gradients together, relative")
    model, images, labels = _small_problem(network)
    with using("reference"):
        exact = _loss_and_gradients(copy.deepcopy(model).double(), images.double(), labels)
    moved = (images.to(device), labels.to(device))
    allowed, wrong = math.inf, []
    for name, one, dtypes in sorted(served(device), key=lambda backend: backend[0] != "reference"):
        if "float32" not in dtypes:
            continue
        try:
            with using(name, one):
                found = _loss_and_gradients(copy.deepcopy(model).to(device), *moved)
            distances = [float((a - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True)]
        except Exception as error:  # a kernel that does not compile or run
            print(f"{_label(name, one):16} {type(error).__name__}: {error}"[:500])
            distances = [math.inf] * 2
        if name == "reference":  # rounding of the other layers, which all backends share
            allowed = min(1e-2, 10 * max(distances) + 1e-6)
        agrees = all(distance <= allowed for distance in distances)
        if not agrees:
            wrong.append(f"{title} on {_label(name, one)}")
        print(f"{_label(name, one):16} {distances[0]:10.2g} {distances[1]:10.2g}  {'ok' if agrees else 'WRONG'}")
    return wrong


def _small_problem(network: str) -> tuple[torch.nn.Module, Tensor, Tensor]:
    """A network with random weights, and a batch of images and labels for it."""
    import timm

    from .. import zoo  # noqa: F401  (registers our models with timm)

    size = 16 if triton.interpreted() else 64
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = timm.create_model(network, num_classes=10).train()
        return model, torch.randn(8, 3, size, size), torch.arange(8)


def _loss_and_gradients(model: torch.nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The loss and all gradients in one vector, float64 on the CPU; the weights of the step are finite."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss = torch.nn.functional.cross_entropy(model(images), labels)
    loss.backward()
    gradients = [one.grad for one in model.parameters() if one.grad is not None]
    optimizer.step()
    vector = torch.cat([one.detach().cpu().double().flatten() for one in gradients])
    return loss.detach().cpu().double(), vector


def _report_speed(device: str) -> None:
    """The operator against unfold, in RedNet-50's first stage."""
    batch = 2 if device == "cpu" else 32
    if triton.interpreted():
        print("\nno times: the kernels are interpreted")
        return
    print(f"\nmilliseconds of involution2d, N = {batch}, C = 64, G = 4, K = 7, 56x56, float32")
    x, k = torch.randn(batch, 64, 56, 56, device=device), torch.randn(batch, 4, 7, 7, 56, 56, device=device)
    x, k = (t.requires_grad_() for t in (x, k))
    g = torch.randn_like(x)

    def forward(operator: Operator) -> None:
        with torch.no_grad():
            operator(x, k, 1)

    def both(operator: Operator) -> None:
        torch.autograd.grad(operator(x, k, 1), (x, k), g)

    operators: dict[str, Operator] = {"involution2d": partial(involution2d, padding=3), "unfold": unfold}
    for what, run in (("forward", forward), ("forward and backward", both)):
        times = interleaved({name: partial(run, operator) for name, operator in operators.items()}, 2)
        ours, theirs = (1e3 * statistics.median(times[name]) for name in operators)
        print(f"{what:21} {ours:8.3g}   unfold {theirs:8.3g}, {theirs / ours:.1f} times as long")
