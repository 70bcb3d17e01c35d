"""The operator's kernels: each map alone, the operator against what others use, the fused layer, threads, one call."""

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
from .roof import Roof, measure_roof
from .timer import Row, interleaved, quartiles, spread

_MAPS = ("apply", "adjoint", "correlate")
_OPS = torch.ops.involution


def maps_of(case: Case, x: Tensor, k: Tensor, g: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Calls of our three maps on these tensors."""
    return {
        "apply": partial(_OPS.apply, x, k, list(g.shape), *case.window),
        "adjoint": partial(_OPS.adjoint, g, k, list(x.shape), *case.window),
        "correlate": partial(_OPS.correlate, g, x, list(k.shape), *case.window),
    }


@torch.no_grad()
def layers(
    cases: Sequence[Case], batches: Sequence[int], seconds: float, roof: Roof, prototype: baselines.Prototype | None
) -> list[Row]:
    """Every map alone: its time and its fraction of the roof; its time over that of the same on tensors stored in 16
    bits; where there is one, the prototype's time over ours.
    """
    rows = []
    for batch in batches:
        for case in cases:
            x, k, g = (tensor.detach() for tensor in case.tensors(batch))
            ours = maps_of(case, x, k, g)
            narrow = {
                name: maps_of(case, *(tensor.to(dtype) for tensor in (x, k, g)))
                for name, dtype in (("bfloat16", torch.bfloat16), ("float16", torch.float16))
            }
            theirs = prototype.maps(case, x, k, g) if prototype else {}
            for name in _MAPS:
                rivals = {"ours": ours[name]} | ({"prototype": theirs[name]} if theirs else {})
                _check_equal({rival: run() for rival, run in rivals.items()})
                times = interleaved(rivals | {dtype: maps[name] for dtype, maps in narrow.items()}, seconds)
                row = _row(name, case, batch, times) | _under(roof, times, case.flops(batch), case.bytes(batch))
                row |= {dtype: median(times["ours"]) / median(times[dtype]) for dtype in narrow}
                if theirs:
                    row["prototype"] = median(times["prototype"]) / median(times["ours"])
                rows.append(row)
    return rows


def _row(what: str, case: Case, batch: int, times: dict[str, list[float]]) -> Row:
    """A row's beginning: what was timed, our spread, and everybody's quartiles for the JSON."""
    row: Row = {"what": what, "case": case.name, "batch": batch, "ms": spread(times["ours"])}
    return row | {"quartiles, ms": {name: quartiles(taken) for name, taken in times.items()}}


def _under(roof: Roof, times: dict[str, list[float]], flops: float, size: float) -> Row:
    """A row's fraction of the roof, and what the picture of it needs."""
    seconds = median(times["ours"])
    return {"seconds": seconds, "roof": roof.seconds(flops, size) / seconds, "flops": flops, "bytes": size}


def against(
    cases: Sequence[Case],
    batches: Sequence[int],
    seconds: float,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> list[Row]:
    """The operator, forward and forward + backward, and how many times longer what others use takes."""
    # Shapes change from case to case, and each must be compiled for its own.
    operators: dict[str, baselines.Operator] = {"ours": _ours, "unfold": baselines.unfold}
    rows = []
    for batch in batches:
        for case in cases:
            torch.compiler.reset()
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
    """Times operators in turn, the first being ours; all results are compared first.

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
        if what == "forward":  # another function, so not compared: what the same window costs a convolution
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

    In 16 bits the others may round every product: then their error is of the size of the whole sum's.
    """
    first, *others = results.values()
    dtype = (first[0] if isinstance(first, tuple) else first).dtype
    rtol, atol = (1e-4, 1e-3) if dtype in (torch.float32, torch.float64) else (0.1, 60 * torch.finfo(dtype).eps)
    for other in others:
        torch.testing.assert_close(other, first, rtol=rtol, atol=atol, check_stride=False)


@torch.no_grad()
def fused(cases: Sequence[Case], batches: Sequence[int], seconds: float, roof: Roof) -> list[Row]:
    """The fused layer against the span convolution and the operator, from hidden features on."""
    rows = []
    for batch in batches:
        for case in cases:
            rivals = _layer_of(case, batch)
            _check_equal({name: run() for name, run in rivals.items()})
            times = interleaved(rivals, seconds)
            row = _row("fused", case, batch, times)
            row |= _under(roof, times, case.fused_flops(batch), case.fused_bytes(batch))
            rows.append(row | {"unfused": median(times["unfused"]) / median(times["ours"])})
    return rows


def _layer_of(case: Case, batch: int) -> dict[str, Callable[[], Tensor]]:
    """Calls of a layer from its hidden features on, to be made without gradients: fused, and in two steps."""
    layer = Involution2d(case.channels, case.kernel_size, case.stride).eval()
    x = case.tensors(batch)[0].detach()
    generator: Any = layer.generator
    hidden = generator.hidden(x).detach()
    weight, bias = generator.span.weight.flatten(1).detach(), generator.span.bias.detach()
    window = [case.kernel_size] * 2, [case.stride] * 2, [1, 1]

    def unfused() -> Tensor:
        return _ours(x, generator.span(hidden).unflatten(1, generator.map_shape), case.stride)

    return {"ours": partial(_OPS.fused, x, hidden, weight, bias, None, None, False, *window), "unfused": unfused}


@torch.no_grad()
def threads(cases: Sequence[Case], batches: Sequence[int], seconds: float) -> list[Row]:
    """How much faster all threads are than one, beside what the two roofs gain."""
    most = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = measure_roof()
        torch.set_num_threads(most)
        together = measure_roof()
        return [
            row for batch in batches for case in cases for row in _threads_of(case, batch, seconds, alone, together)
        ]
    finally:
        torch.set_num_threads(most)


def _threads_of(case: Case, batch: int, seconds: float, alone: Roof, together: Roof) -> list[Row]:
    most = torch.get_num_threads()
    counts = {"one thread": 1, "ours": most}
    tensors = [tensor.detach() for tensor in case.tensors(batch)]
    calls = maps_of(case, *tensors) | {"fused": _layer_of(case, batch)["ours"]}
    wakes = torch.ones(1 << 20)  # enough for every thread to have a part, so that the timed call finds all of them

    def prepare(name: str) -> None:
        torch.set_num_threads(counts[name])
        wakes.mul_(1)

    rows = []
    for name, run in calls.items():
        times = interleaved(dict.fromkeys(counts, run), seconds, prepare)
        flops, size = case.flops(batch), case.bytes(batch)
        if name == "fused":
            flops, size = case.fused_flops(batch), case.fused_bytes(batch)
        row = _row(f"{name}, {most} threads", case, batch, times)
        row["faster"] = median(times["one thread"]) / median(times["ours"])
        rows.append(row | {"roof's gain": alone.seconds(flops, size) / together.seconds(flops, size)})
    return rows


def overhead(seconds: float) -> list[Row]:
    """One call on a tiny tensor, beside an operator of the same signature that does nothing but allocate."""
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
                name: partial(_repeat, run, 100)
                for name, run in {"ours": partial(involution2d, x, k, 1, 1), "floor": floor}.items()
            }
            times = interleaved(rivals, seconds)
        times = {name: [taken / 100 for taken in values] for name, values in times.items()}
        row = {"what": what, "case": tiny.name, "batch": 1, "us": median(times["ours"]) * 1e6}
        row |= {"floor, us": median(times["floor"]) * 1e6}
        rows.append(row | {"quartiles, ms": {name: quartiles(values) for name, values in times.items()}})
    return rows


def _repeat(run: Callable[[], object], times: int) -> None:
    for _ in range(times):
        run()
