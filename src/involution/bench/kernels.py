"""The operator's kernels: each map alone, the operator against what others use, the fused layer, threads, one call."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..nn.involution import Involution2d
from ..ops.functional import involution2d
from . import baselines
from .cases import Case
from .roof import Roof, measure_roof
from .timer import in_turn, median, spread

Row = dict[str, Any]
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
    """Every map alone: its time, its fraction of the roof and, where there is one, the prototype's time over ours."""
    rows = []
    for batch in batches:
        for case in cases:
            x, k, g = (tensor.detach() for tensor in case.tensors(batch))
            ours = maps_of(case, x, k, g)
            theirs = prototype.maps(case, x, k, g) if prototype else {}
            for name in _MAPS:
                rivals = {"ours": ours[name]} | ({"prototype": theirs[name]} if theirs else {})
                _check_equal({rival: run() for rival, run in rivals.items()})
                times = in_turn(rivals, seconds)
                least = roof.seconds(case.flops(batch), case.bytes(batch))
                row = {"what": name, "case": case.name, "batch": batch, "ms": spread(times["ours"])}
                row |= {"seconds": median(times["ours"]), "roof": least / median(times["ours"])}
                row |= {"flops": case.flops(batch), "bytes": case.bytes(batch)}
                if theirs:
                    row["prototype"] = median(times["prototype"]) / median(times["ours"])
                rows.append(row)
    return rows


def against(cases: Sequence[Case], batches: Sequence[int], seconds: float, device: str = "cpu") -> list[Row]:
    """The operator, forward and forward + backward, and how many times longer what others use takes."""
    # Shapes change from case to case, and each must be compiled for its own.
    operators: dict[str, baselines.Operator] = {"ours": _ours, "unfold": baselines.unfold}
    rows = []
    for batch in batches:
        for case in cases:
            torch.compiler.reset()
            rivals = operators | {"shifts, compiled": torch.compile(baselines.shifted, dynamic=False)}
            rows += compare(rivals, case, batch, seconds, device)
    return rows


def compare(
    operators: dict[str, baselines.Operator], case: Case, batch: int, seconds: float, device: str = "cpu"
) -> list[Row]:
    """Times operators in turn, the first being ours; all results are compared first.

    Raises:
        AssertionError: an operator computes something else.
    """
    x, k, g = case.tensors(batch, device)

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
        times = in_turn(rivals, seconds)
        base = median(times["ours"])
        row: Row = {"what": what, "case": case.name, "batch": batch, "ms": spread(times["ours"])}
        rows.append(row | {name: median(times[name]) / base for name in rivals if name != "ours"})
    return rows


def _ours(x: Tensor, k: Tensor, stride: int) -> Tensor:
    return involution2d(x, k, stride, k.shape[2] // 2)


def _check_equal(results: dict[str, Any]) -> None:
    """Raises AssertionError unless all results are close to the first."""
    first, *others = results.values()
    for other in others:
        torch.testing.assert_close(other, first, rtol=1e-4, atol=1e-3, check_stride=False)


@torch.no_grad()
def fused(cases: Sequence[Case], batches: Sequence[int], seconds: float) -> list[Row]:
    """The fused layer against the span convolution and the operator, from hidden features on."""
    rows = []
    for batch in batches:
        for case in cases:
            layer = Involution2d(case.channels, case.kernel_size, case.stride).eval()
            x = case.tensors(batch)[0].detach()
            generator: Any = layer.generator
            hidden = generator.hidden(x)
            weight, bias = generator.span.weight.flatten(1), generator.span.bias
            window = [case.kernel_size] * 2, [case.stride] * 2, [1, 1]

            def unfused(x: Tensor = x, h: Tensor = hidden, generator: Any = generator, case: Case = case) -> Tensor:
                kernel_map = generator.span(h).unflatten(1, generator.map_shape)
                return _ours(x, kernel_map, case.stride)

            once = partial(_OPS.fused, x, hidden, weight, bias, None, None, False, *window)
            rivals: dict[str, Callable[[], Tensor]] = {"ours": once, "unfused": unfused}
            _check_equal({name: run() for name, run in rivals.items()})
            times = in_turn(rivals, seconds)
            row = {"what": "fused", "case": case.name, "batch": batch, "ms": spread(times["ours"])}
            rows.append(row | {"unfused": median(times["unfused"]) / median(times["ours"])})
    return rows


@torch.no_grad()
def threads(cases: Sequence[Case], batches: Sequence[int], seconds: float) -> list[Row]:
    """How much faster all threads are than one, beside what the two roofs gain."""
    most = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = measure_roof()
    finally:
        torch.set_num_threads(most)
    together = measure_roof()

    def with_threads(count: int, run: Callable[[], Tensor]) -> None:
        torch.set_num_threads(count)
        run()

    rows = []
    for batch in batches:
        for case in cases:
            gain = alone.seconds(case.flops(batch), case.bytes(batch)) / together.seconds(
                case.flops(batch), case.bytes(batch)
            )
            tensors = [tensor.detach() for tensor in case.tensors(batch)]
            for name, run in maps_of(case, *tensors).items():
                rivals = {str(count): partial(with_threads, count, run) for count in (1, most)}
                times = in_turn(rivals, seconds)
                torch.set_num_threads(most)
                row = {"what": f"{name}, {most} threads", "case": case.name, "batch": batch}
                row |= {"ms": spread(times[str(most)]), "faster": median(times["1"]) / median(times[str(most)])}
                rows.append(row | {"roof's gain": gain})
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
            times = in_turn(rivals, seconds)
        per_call = {name: median(values) / 100 for name, values in times.items()}
        row = {"what": what, "case": tiny.name, "batch": 1, "us": f"{per_call['ours'] * 1e6:.1f}"}
        rows.append(row | {"floor, us": f"{per_call['floor'] * 1e6:.1f}"})
    return rows


def _repeat(run: Callable[[], object], times: int) -> None:
    for _ in range(times):
        run()
