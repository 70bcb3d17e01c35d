"""The operator's kernels: each map, the operator against other implementations, the fused layer, threads, overhead."""

from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

from ..nn.involution import Involution2d
from ..ops.functional import involution2d
from . import baselines
from .cases import Case
from .registry import Workload, subject
from .roofline import Roofline, measure_roofline
from .timer import Row, interleaved, quartiles, spread

_MAPS = ("apply", "adjoint", "correlate")
_OPS = torch.ops.involution
_16_BIT = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@subject("layers", ("workloads", "seconds", "roofline"))
@torch.no_grad()
def layers(workloads: Sequence[Workload], seconds: float, roofline: Roofline) -> list[Row]:
    """Each map alone: its time, its fraction of the roofline bound, and its speedup on 16-bit tensors."""
    rows = []
    for case, batch in workloads:
        x, k, g = (tensor.detach() for tensor in case.tensors(batch))
        ours = maps_of(case, x, k, g)
        narrow = {name: maps_of(case, *(t.to(dtype) for t in (x, k, g))) for name, dtype in _16_BIT.items()}
        for name in _MAPS:
            times = interleaved({"ours": ours[name]} | {dtype: maps[name] for dtype, maps in narrow.items()}, seconds)
            row = _row(name, case, batch, times) | _bound(roofline, times, case.flops(batch), case.bytes(batch))
            rows.append(row | {dtype: median(times["ours"]) / median(times[dtype]) for dtype in narrow})
    return rows


def maps_of(case: Case, x: Tensor, k: Tensor, g: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Calls of the three maps on these tensors."""
    return {
        "apply": partial(_OPS.apply, x, k, list(g.shape), *case.window),
        "adjoint": partial(_OPS.adjoint, g, k, list(x.shape), *case.window),
        "correlate": partial(_OPS.correlate, g, x, list(k.shape), *case.window),
    }


def _row(what: str, case: Case, batch: int, times: dict[str, list[float]]) -> Row:
    """A row's first columns: what was timed, our spread, and the quartiles of all rivals for the JSON."""
    row: Row = {"what": what, "case": case.name, "batch": batch, "ms": spread(times["ours"])}
    return row | {"quartiles, ms": {name: quartiles(taken) for name, taken in times.items()}}


def _bound(roofline: Roofline, times: dict[str, list[float]], flops: float, size: float) -> Row:
    """A row's fraction of the roofline bound, and what the roofline plot needs."""
    seconds = median(times["ours"])
    fraction = roofline.min_seconds(flops, size) / seconds
    return {"seconds": seconds, "roofline": fraction, "flops": flops, "bytes": size}


@subject("against", ("workloads", "seconds", "device", "dtype"))
def against(
    workloads: Sequence[Workload], seconds: float, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> list[Row]:
    """The operator, forward and forward + backward, and how many times longer other implementations take."""
    operators: dict[str, baselines.Operator] = {"ours": _ours, "unfold": baselines.unfold}
    rows = []
    for case, batch in workloads:
        torch.compiler.reset()  # every case's shapes are compiled for themselves
        rivals = operators | {"shifts, compiled": torch.compile(baselines.shifted, dynamic=False)}
        rows += compare(rivals, case, batch, seconds, device, dtype)
    return rows


def compare(
    operators: dict[str, baselines.Operator],
    case: Case,
    batch: int,
    seconds: float,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> list[Row]:
    """Times operators interleaved, the first being ours, after a check that all results are equal.

    Raises:
        AssertionError: an operator computes something else.
    """
    x, k, g = case.tensors(batch, device, dtype)

    def forward(operator: baselines.Operator) -> Tensor:
        with torch.no_grad():
            return operator(x, k, case.stride)

    def both(operator: baselines.Operator) -> tuple[Tensor, ...]:
        y = operator(x, k, case.stride)
        return y.detach(), *torch.autograd.grad(y, (x, k), g)

    _check_equal({name: both(operator) for name, operator in operators.items()})
    rows = []
    for what, run in (("forward", forward), ("forward + backward", both)):
        rivals = {name: partial(run, operator) for name, operator in operators.items()}
        if what == "forward":  # another function, so not checked: what a convolution with this window costs
            rivals["depthwise"] = partial(forward, baselines.depthwise)
        times = interleaved(rivals, seconds)
        row = _row(what, case, batch, times)
        for name in [name for name in rivals if name != "ours"]:
            row |= {f"{name}, ms": spread(times[name]), name: median(times[name]) / median(times["ours"])}
        rows.append(row)
    return rows


def _ours(x: Tensor, k: Tensor, stride: int) -> Tensor:
    return involution2d(x, k, stride, k.shape[2] // 2)


def _check_equal(results: dict[str, Any]) -> None:
    """Raises AssertionError unless all results are close to the first.

    In 16 bits the others may round every product, so their error is relative to the whole sum.
    """
    first, *others = results.values()
    dtype = (first[0] if isinstance(first, tuple) else first).dtype
    rtol, atol = (1e-4, 1e-3) if dtype in (torch.float32, torch.float64) else (0.1, 60 * torch.finfo(dtype).eps)
    for other in others:
        torch.testing.assert_close(other, first, rtol=rtol, atol=atol, check_stride=False)


@subject("fused", ("workloads", "seconds", "roofline"))
@torch.no_grad()
def fused(workloads: Sequence[Workload], seconds: float, roofline: Roofline) -> list[Row]:
    """The fused layer against the span convolution and the operator, both from the hidden features on."""
    rows = []
    for case, batch in workloads:
        rivals = _fused_layer_of(case, batch)
        _check_equal({name: run() for name, run in rivals.items()})
        times = interleaved(rivals, seconds)
        row = _row("fused", case, batch, times)
        row |= _bound(roofline, times, case.fused_flops(batch), case.fused_bytes(batch))
        rows.append(row | {"unfused": median(times["unfused"]) / median(times["ours"])})
    return rows


def _fused_layer_of(case: Case, batch: int) -> dict[str, Callable[[], Tensor]]:
    """Calls of a layer from its hidden features on, for use without gradients: fused, and in two steps."""
    layer = Involution2d(case.channels, case.kernel_size, case.stride).eval()
    x = case.tensors(batch)[0].detach()
    generator: Any = layer.generator
    hidden = generator.hidden(x).detach()
    weight, bias = generator.span.weight.flatten(1).detach(), generator.span.bias.detach()
    window = [case.kernel_size] * 2, [case.stride] * 2, [1, 1]

    def unfused() -> Tensor:
        return _ours(x, generator.span(hidden).unflatten(1, generator.map_shape), case.stride)

    ours = partial(_OPS.fused_layer, x, hidden, weight, bias, None, None, False, *window)
    return {"ours": ours, "unfused": unfused}


@subject("threads", ("workloads", "seconds"))
@torch.no_grad()
def threads(workloads: Sequence[Workload], seconds: float) -> list[Row]:
    """The speedup of all threads over one, beside that of the two roofline bounds."""
    count = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = measure_roofline()
        torch.set_num_threads(count)
        together = measure_roofline()
        return [row for case, batch in workloads for row in _threads_of(case, batch, seconds, alone, together)]
    finally:
        torch.set_num_threads(count)


def _threads_of(case: Case, batch: int, seconds: float, alone: Roofline, together: Roofline) -> list[Row]:
    every = torch.get_num_threads()
    counts = {"one thread": 1, "ours": every}
    tensors = [tensor.detach() for tensor in case.tensors(batch)]
    calls = maps_of(case, *tensors) | {"fused": _fused_layer_of(case, batch)["ours"]}
    wakes = torch.ones(1 << 20)  # large enough for work on every thread, so that the timed call finds all awake

    def prepare(name: str) -> None:
        torch.set_num_threads(counts[name])
        wakes.mul_(1)

    rows = []
    for name, run in calls.items():
        times = interleaved(dict.fromkeys(counts, run), seconds, prepare)
        flops, size = case.flops(batch), case.bytes(batch)
        if name == "fused":
            flops, size = case.fused_flops(batch), case.fused_bytes(batch)
        row = _row(f"{name}, {every} threads", case, batch, times)
        row["faster"] = median(times["one thread"]) / median(times["ours"])
        rows.append(row | {"roofline's gain": alone.min_seconds(flops, size) / together.min_seconds(flops, size)})
    return rows


@subject("overhead", ("seconds",))
def overhead(seconds: float) -> list[Row]:
    """One call on a tiny tensor, beside an operator of the same signature that only allocates."""
    library = torch.library.Library("involution_bench", "FRAGMENT")
    arguments = "Tensor a, Tensor b, SymInt[] size, SymInt[] stride, SymInt[] padding, SymInt[] dilation"
    library.define(f"floor({arguments}) -> Tensor")
    library.impl("floor", lambda a, *_: torch.empty_like(a), "CompositeExplicitAutograd")
    torch.library.register_autograd(
        "involution_bench::floor", lambda ctx, g: (g, *[None] * 5), setup_context=lambda *_, **__: None, lib=library
    )
    tiny = Case("C16@4", 16, 4, 4, 3, 1)
    rows = []
    for what, gradient in (("a call, no gradient", False), ("a call, recording", True)):
        x, k, _ = tiny.tensors(1)
        floor = partial(torch.ops.involution_bench.floor.default, x, k, list(x.shape), *tiny.window)
        with torch.set_grad_enabled(gradient):
            rivals = {
                name: partial(_repeat, run)
                for name, run in {"ours": partial(involution2d, x, k, 1, 1), "floor": floor}.items()
            }
            times = interleaved(rivals, seconds)
        times = {name: [taken / _CALLS for taken in values] for name, values in times.items()}
        row = {"what": what, "case": tiny.name, "batch": 1, "us": median(times["ours"]) * 1e6}
        row |= {"floor, us": median(times["floor"]) * 1e6}
        rows.append(row | {"quartiles, ms": {name: quartiles(values) for name, values in times.items()}})
    return rows


_CALLS = 100  # in one measurement


def _repeat(run: Callable[[], object]) -> None:
    for _ in range(_CALLS):
        run()
