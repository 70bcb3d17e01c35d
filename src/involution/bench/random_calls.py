"""Random calls of the operator and of the fused layer, each compared with the reference in float64 on the CPU."""

import math
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops.backends import cpu_library, selection
from ..ops.functional import involution1d, involution2d, involution3d
from ..ops.fused import fused_layer
from ..ops.layouts import in_layout

OPERATORS = ("involution1d", "involution2d", "involution3d", "fused_layer")
_INVOLUTION = {1: involution1d, 2: involution2d, 3: involution3d}
_FUSED_ROUNDINGS = 8  # of a fused layer's result, in machine epsilons of the sums over absolute values


class Call(NamedTuple):
    """One call of a backend, with everything that reproduces it; its tensors are random numbers of a seed.

    `operator` is one of OPERATORS, `instruction_set` of the cpu backend ("" for the others), `dtype` a name in torch,
    `width` the channels per group. `padding` is ignored by the fused layer; `hidden` and `relu` are of it alone.
    """

    operator: str
    backend: str
    instruction_set: str
    device: str
    dtype: str
    channels_last: bool
    batch: int
    groups: int
    width: int
    input: tuple[int, ...]
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    hidden: int
    relu: bool
    seed: int

    def compare(self) -> dict[str, float]:
        """Every result's largest error, in units of the bound for its rounding; above 1 it is wrong.

        Results are the output "y" and the gradients of all tensors, such as "dinput". A NaN is an infinite error.
        """
        dtype = getattr(torch, self.dtype)
        tensors = {name: tensor.to(dtype) for name, tensor in self._tensors().items()}
        exact = {name: tensor.double() for name, tensor in tensors.items()}
        with using("reference"):
            bounds = self._results({name: tensor.abs() for name, tensor in exact.items()}, relu=False)
            if self.relu:  # rounding may decide the sign of y near 0: no gradient there
                y = self._results(exact, relu=False)["y"]
                for given in (tensors, exact):
                    given["grad"] = given["grad"] * (y.abs() > 64 * torch.finfo(dtype).eps * bounds["y"])
            wanted = self._results(exact, self.relu)
        with using(self.backend, self.instruction_set):
            moved = {name: self._in_layout(tensor).to(self.device) for name, tensor in tensors.items()}
            found = self._results(moved, self.relu)
        return {name: self._error(found[name], wanted[name], bounds[name]) for name in wanted}

    def line(self) -> str:
        """This comparison as a line of Python."""
        return f"from involution.bench.random_calls import Call; print({self!r}.compare())"

    def _error(self, found: Tensor, wanted: Tensor, size: Tensor) -> float:
        """The largest error relative to its bound; `size` is the same sum over absolute values."""
        kind = torch.finfo(getattr(torch, self.dtype))
        if str(found.dtype) != f"torch.{self.dtype}" or found.shape != wanted.shape:
            return math.inf
        if self.operator == "fused_layer":
            bound = _FUSED_ROUNDINGS * kind.eps * size
        else:
            accumulated = min(kind.eps, torch.finfo(torch.float32).eps)
            terms = max(math.prod(self.kernel_size), self.width)
            bound = kind.eps * wanted.abs() + (terms + 2) * accumulated * size
        error = (found.detach().cpu().double() - wanted).abs() / (bound + kind.smallest_normal * kind.eps)
        return float(error.nan_to_num(math.inf).max())

    def _output(self) -> tuple[int, ...]:
        if self.operator == "fused_layer":
            return tuple(-(-size // step) for size, step in zip(self.input, self.stride, strict=True))
        axes = zip(self.input, self.kernel_size, self.stride, self.padding, self.dilation, strict=True)
        return tuple((size + 2 * p - d * (k - 1) - 1) // s + 1 for size, k, s, p, d in axes)

    def _tensors(self) -> dict[str, Tensor]:
        """The arguments by name, and the output's gradient "grad": float64 on the CPU, contiguous."""
        channels, output, taps = self.groups * self.width, self._output(), math.prod(self.kernel_size)
        shapes: dict[str, Sequence[int]] = {"input": (self.batch, channels, *self.input)}
        if self.operator == "fused_layer":
            shapes |= {
                "hidden": (self.batch, self.hidden, *output),
                "span_weight": (self.groups * taps, self.hidden),
                "span_bias": (self.groups * taps,),
                "scale": (channels,),
                "shift": (channels,),
            }
        else:
            shapes["kernel_map"] = (self.batch, self.groups, *self.kernel_size, *output)
        shapes["grad"] = (self.batch, channels, *output)
        numbers = torch.Generator().manual_seed(self.seed)
        return {
            name: torch.randn(tuple(shape), generator=numbers, dtype=torch.float64) for name, shape in shapes.items()
        }

    def _in_layout(self, tensor: Tensor) -> Tensor:
        """An image in the call's layout; vectors and matrices as they are."""
        if tensor.dim() < 3:
            return tensor
        is_map = tensor.dim() == 2 + 2 * len(self.input)
        return in_layout(self.channels_last, "kernel_map" if is_map else "input", tensor)

    def _results(self, tensors: dict[str, Tensor], relu: bool) -> dict[str, Tensor]:
        """The output and the gradients of the arguments."""
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items() if name != "grad"}
        if self.operator == "fused_layer":
            y = fused_layer(
                leaves["input"],
                leaves["hidden"],
                leaves["span_weight"],
                leaves["span_bias"],
                self.kernel_size,
                self.stride,
                self.dilation,
                leaves["scale"],
                leaves["shift"],
                relu,
            )
        else:
            operator = _INVOLUTION[len(self.input)]
            y = operator(leaves["input"], leaves["kernel_map"], self.stride, self.padding, self.dilation)
        gradients = torch.autograd.grad(y, list(leaves.values()), tensors["grad"])
        return {"y": y.detach()} | {f"d{name}": one for name, one in zip(leaves, gradients, strict=True)}


def random_call(
    operator: str, backend: str, instruction_set: str, device: str, dtype: str, seed: str, limit: int
) -> Call:
    """A call whose geometry and values a seed decides.

    Args:
        operator: one of OPERATORS.
        backend: its name.
        instruction_set: of the cpu backend, else "".
        device: as torch names it.
        dtype: as torch names it.
        seed: any text.
        limit: the number of multiply-adds of a map that no call exceeds, unless a single position does.
    """
    numbers = random.Random(seed)
    fused = operator == "fused_layer"
    dims = numbers.randint(1, 3) if fused else int(operator[-2])
    kernel = (*(numbers.randint(1, 3) for _ in range(dims - 1)), numbers.choice([1, 2, 3, 3, 5, 7, 7]))
    if dims == 2 and numbers.random() < 0.5:
        kernel = (kernel[1], kernel[1])
    stride = tuple(numbers.choice([1, 1, 1, 2, 3]) for _ in range(dims))
    dilation = tuple(numbers.choice([1, 1, 1, 2]) for _ in range(dims))
    padding = tuple(numbers.randint(0, d * (k - 1)) for k, d in zip(kernel, dilation, strict=True))
    sizes = []
    for axis in range(dims):
        smallest = max(1, dilation[axis] * (kernel[axis] - 1) + 1 - 2 * padding[axis])
        sizes.append(smallest + numbers.randint(0, 40 if axis == dims - 1 else 8))
    groups, width = numbers.randint(1, 4), numbers.choice([1, 3, 4, 8, 16, 16, 16, 24, 32])
    batch, per_position = numbers.randint(1, 2), groups * width * math.prod(kernel)
    for axis in range(dims):  # at most `limit` multiply-adds
        rest = batch * per_position * math.prod(sizes) // sizes[axis]
        smallest = max(1, dilation[axis] * (kernel[axis] - 1) + 1 - 2 * padding[axis])
        sizes[axis] = max(smallest, min(sizes[axis], limit // rest))
    hidden = numbers.randint(1, 16 * groups) if fused else 0
    layout, relu = numbers.random() < 0.5, fused and numbers.random() < 0.5
    shape = (layout, batch, groups, width, tuple(sizes), kernel, stride, padding, dilation)
    return Call(operator, backend, instruction_set, device, dtype, *shape, hidden, relu, numbers.randrange(2**31))


def instruction_sets() -> list[str]:
    """The instruction sets that the CPU kernels can use here, the best first."""
    library = cpu_library.library()
    if library is None:
        return []
    before = cpu_library.instruction_set()
    found = [name for name in ("avx512", "avx2", "baseline") if library.involution_use(name.encode())]
    library.involution_use(before.encode())
    return found


@contextmanager
def using(backend: str, instruction_set: str = "") -> Iterator[None]:
    """Runs the block on one backend and, unless it is "", with one instruction set of the CPU kernels.

    Raises:
        ValueError: this machine does not have the instruction set.
    """
    forced, library = selection.forced, cpu_library.library()
    before = cpu_library.instruction_set() if library else ""
    selection.forced = backend
    try:
        if instruction_set and not (library and library.involution_use(instruction_set.encode())):
            raise ValueError(f"instruction_set must be one of {instruction_sets()}, got {instruction_set!r}")
        yield
    finally:
        selection.forced = forced
        if library:
            library.involution_use(before.encode())
