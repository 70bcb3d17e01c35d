"""The GPU backend: launches the Triton kernels of triton_kernels.py, on the tensors' device and its current stream.

With TRITON_INTERPRET=1 in the environment the same kernels run on CPU tensors, interpreted: slow, and for tests.
"""

import importlib.util
import math
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..geometry import MAPS, Geometry
from ..layer import LayerParts, unpack
from ..layouts import is_channels_last, memory_order
from . import reference

DEVICES = ("cuda", "xpu")  # "cuda" is AMD's too
_OLDEST = (7, 0)  # NVIDIA's compute capability that Triton compiles for
_ROLES = {map.name: (*map.takes, map.makes) for map in MAPS}
_MAP_AT_ONCE = 1 << 24  # numbers of the kernel map in a fused layer's backward pass


class Tile(NamedTuple):
    """What one program makes, and with how many warps; all powers of two."""

    positions: int
    groups: int
    width: int  # channels of a group
    warps: int
    registers: int | None = None  # a thread may have, where NVIDIA's assembler by itself spills some to use fewer


def apply(input: Tensor, kernel_map: Tensor, out: Tensor, geometry: Geometry) -> None:
    """See reference.apply."""
    _call("apply", (input, kernel_map, out), geometry)


def adjoint(grad: Tensor, kernel_map: Tensor, out: Tensor, geometry: Geometry) -> None:
    """See reference.adjoint."""
    _call("adjoint", (grad, kernel_map, out), geometry)


def correlate(grad: Tensor, input: Tensor, out: Tensor, geometry: Geometry) -> None:
    """See reference.correlate."""
    _call("correlate", (grad, input, out), geometry)


def _call(name: str, tensors: tuple[Tensor, Tensor, Tensor], geometry: Geometry) -> None:
    """Brings both operands into the layout of the first, runs the kernel, and fills `out` (last)."""
    channels_last = is_channels_last(tensors[0])
    if channels_last:
        orders = (memory_order(role, len(geometry.input)) for role in _ROLES[name])
        tensors = tuple(t.permute(order) for t, order in zip(tensors, orders, strict=True))  # type: ignore[assignment]
    first, second, out = tensors[0].contiguous(), tensors[1].contiguous(), tensors[2]
    result = out if out.is_contiguous() else torch.empty(out.shape, dtype=out.dtype, device=out.device)
    *axes, (rows,) = _sizes(geometry)
    chunks = -(-geometry.kernel[-1] // 8)
    sizes = (*axes, (rows * chunks,))
    made = geometry.input if name == "adjoint" else geometry.output
    choice = tiles(name, geometry, channels_last, result.dtype)
    tensors = first, second, result
    _launch(
        f"{name}_kernel", tensors, sizes, geometry, made, choice, {"CHANNELS_LAST": channels_last, "CHUNKS": chunks}
    )
    if result is not out:
        out.copy_(result)


def fused_layer(parts: LayerParts, outs: Sequence[Tensor], geometry: Geometry) -> None:
    """See reference.fused_layer. In one kernel, except in float64 and for more features than the registers hold."""
    most = {2: 256, 4: 128}.get(outs[0].dtype.itemsize, 0)  # features whose tile fits the registers
    fits = parts.input.dtype != torch.float64 and parts.span_weight.shape[1] <= min(most, 16 * geometry.groups)
    reference.fused_layer(parts, outs, geometry, _fused if fits else _in_steps)


def _in_steps(parts: LayerParts, hidden: Tensor, y: Tensor, geometry: Geometry) -> Tensor:
    return reference.in_steps(parts, hidden, y, geometry, apply)


def _fused(parts: LayerParts, hidden: Tensor, y: Tensor, geometry: Geometry) -> Tensor:
    """Runs the fused kernel, which is for channels_last."""
    x, features = (image.movedim(1, -1).contiguous() for image in (parts.input, hidden))
    in_memory = y.movedim(1, -1)
    result = in_memory if in_memory.is_contiguous() else torch.empty(in_memory.shape, dtype=y.dtype, device=y.device)
    weight = unpack(parts.span_weight, parts.span_bias).contiguous()
    vectors = (None if t is None else t.contiguous() for t in (parts.span_bias, parts.scale, parts.shift))
    sizes = (*_sizes(geometry), (features.shape[-1],))
    options = {
        "HIDDEN": max(16, _power_of_two(features.shape[-1])),
        "RELU": parts.relu,
        "PRECISION": "tf32" if x.device.type == "cuda" and torch.version.hip is None and _tf32() else "ieee",
        "UPCAST": interpreted(),
    }
    tensors = (x, features, weight, *vectors, result)
    choice = tiles("fused", geometry, True, y.dtype, features.shape[-1])
    _launch("fused_kernel", tensors, sizes, geometry, geometry.output, choice, options)
    return y if result is in_memory else result.movedim(-1, 1)


def _tf32() -> bool:
    """Whether products of float32 matrices may be rounded, by torch's newer switch or its older one."""
    switch: str = getattr(torch.backends.cuda.matmul, "fp32_precision", "none")
    return switch == "tf32" or (switch == "none" and torch.get_float32_matmul_precision() != "highest")


def fused_layer_backward(grad: Tensor, parts: LayerParts, results: Sequence[Tensor], geometry: Geometry) -> None:
    """See reference.fused_layer_backward. The map is made again for some images at a time."""
    image = geometry.groups * math.prod(geometry.kernel) * math.prod(geometry.output)
    reference.fused_layer_backward(grad, parts, results, geometry, (adjoint, correlate), max(1, _MAP_AT_ONCE // image))


def _sizes(geometry: Geometry) -> tuple[tuple[int, ...], ...]:
    """Groups and their width, the three axes of the input and of the output, and the kernel's rows of taps."""
    width, rows = geometry.channels // geometry.groups, math.prod(geometry.kernel[:-1])
    return (geometry.groups, width), _three(geometry.input, 1), _three(geometry.output, 1), (rows,)


def tiles(name: str, geometry: Geometry, channels_last: bool, dtype: torch.dtype, hidden: int = 0) -> list[Tile]:
    """The tiles to choose from for a kernel, the first being the default; none depends on an image's size.

    Small ones: what a thread keeps must fit its registers, and a warp alone needs no barriers. `hidden` are the fused
    layer's features.
    """
    width, groups = _power_of_two(geometry.channels // geometry.groups), _power_of_two(geometry.groups)
    aligned = geometry.channels % 16 == 0
    numbers = 512 if aligned and dtype != torch.float64 else 128  # of a warp
    if name == "fused":
        half = dtype.itemsize == 2  # else its products take more registers
        groups, width = min(16 if half else 8, groups), min(16, width)
        widest = max(groups * width, _power_of_two(hidden))
        some = (
            (p, _between(2, p * widest // numbers, 8 if half else 4)) for p in ((32, 16) if aligned and half else (16,))
        )
        return [
            Tile(positions, groups, width, warps, None if half and groups > 2 else 255) for positions, warps in some
        ]
    registers = None if numbers == 512 and channels_last else 255
    if name == "correlate":  # has all channels of a group
        taken = max(8, width)  # a row of eight sums, or weights, takes as much as eight channels
        groups = min(groups, max(1, 64 // taken)) if channels_last else 1
        warps = _between(1 if channels_last else 4, groups * taken // numbers, 8)
        some = ((_between(1, count // (groups * taken), count), warps) for count in (numbers, 2 * numbers))
        return [Tile(positions, groups, width, warps, registers) for positions, warps in some]
    if channels_last:  # neighbours in memory are channels: 64 of them fill a line
        width, taken = min(16, width), max(8, min(16, width))
        groups = min(groups, 64 // taken)
        return [Tile(warps * numbers // (groups * taken), groups, width, warps, registers) for warps in (1, 2, 4)]
    return [Tile(positions, 1, min(4, width), 4, registers) for positions in (numbers // 8, numbers // 4)]


def _launch(
    name: str,
    tensors: Sequence[Tensor | None],
    sizes: Sequence[Sequence[int]],
    geometry: Geometry,
    made: Sequence[int],
    choice: Sequence[Tile],
    options: dict[str, Any] | None = None,
) -> None:
    """Runs a kernel: one program for every tile of the `made` positions, of every block of channels, of every image."""
    groups, width = sizes[0]

    def grid(meta: dict[str, Any]) -> tuple[int]:
        blocks = -(-groups // meta["GROUPS"]) * -(-width // meta["WIDTH"])
        return (-(-math.prod(made) // meta["POSITIONS"]) * blocks * geometry.batch,)

    numbers = [number for some in sizes for number in some]
    window = {axes.upper(): _three(getattr(geometry, axes), int(axes != "padding")) for axes in _WINDOW}
    constants = window | {"WIDE": _is_wide(geometry)} | (options or {})
    device = next(tensor.device for tensor in tensors if tensor is not None)
    with _current(device):
        if os.environ.get("INVOLUTION_AUTOTUNE") == "1" and not interpreted():
            _tuned(name, tuple(choice))[grid](*tensors, *numbers, **constants)
        else:
            tile = choice[0]
            blocks = {"POSITIONS": tile.positions, "GROUPS": tile.groups, "WIDTH": tile.width}
            compiler = compiler_options(tile, device.type == "cuda" and torch.version.hip is None)
            _kernel(name)[grid](*tensors, *numbers, **constants, **blocks, **compiler)


def compiler_options(tile: Tile, nvidia: bool) -> dict[str, int]:
    """What a tile says of warps and registers, as Triton's compiler takes it."""
    return {"num_warps": tile.warps} | ({"maxnreg": tile.registers} if nvidia and tile.registers else {})


def _is_wide(geometry: Geometry) -> bool:
    """Whether one image's distances, or positions that a window reaches outside of it, leave 32 bits."""
    inputs, outputs, taps = (math.prod(axes) for axes in (geometry.input, geometry.output, geometry.kernel))
    reach = math.prod(
        output * stride + (kernel - 1) * dilation + padding
        for output, stride, kernel, dilation, padding in zip(
            geometry.output, geometry.stride, geometry.kernel, geometry.dilation, geometry.padding, strict=True
        )
    )
    return max(geometry.channels * max(inputs, outputs), geometry.groups * taps * outputs, 2 * reach) >= 2**31


_WINDOW = ("kernel", "stride", "padding", "dilation")


def _three(axes: Sequence[int], missing: int) -> tuple[int, ...]:
    return (*(missing,) * (3 - len(axes)), *axes)


def _power_of_two(number: int) -> int:
    """The least one that is not below."""
    return 1 << (number - 1).bit_length()


def _between(least: int, number: int, most: int) -> int:
    return max(least, min(number, most))


def _current(device: torch.device) -> AbstractContextManager[Any]:
    return nullcontext() if device.type == "cpu" else torch.accelerator.device_index(device.index)


@cache
def _kernel(name: str) -> Any:
    from . import triton_kernels  # loads Triton

    return getattr(triton_kernels, name)


@cache
def _tuned(name: str, choice: tuple[Tile, ...]) -> Any:
    """The kernel with the fastest of the tiles, found at the first call with such groups, layout and window."""
    import triton

    configs = [
        triton.Config(
            {"POSITIONS": tile.positions, "GROUPS": tile.groups, "WIDTH": tile.width},
            **compiler_options(tile, torch.version.hip is None and torch.cuda.is_available()),
        )
        for tile in choice
    ]
    key = ["groups", "width", "KERNEL", "STRIDE", "DILATION", "CHANNELS_LAST"]
    return triton.autotune(configs, key=key, cache_results=True)(_kernel(name))


def interpreted() -> bool:
    """Whether Triton interprets its kernels, on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def fuses(tensor: Tensor) -> bool:
    """See selection.BackendModule."""
    return _TRITON and tensor.device.type in DEVICES and tensor.dtype != torch.float64


def why_not(tensor: Tensor | None) -> str:
    """Why the kernels cannot run on tensors like this one, or (None) at all; empty if they can."""
    if not _TRITON:
        return "triton is not installed"
    if tensor is None:
        found = interpreted() or any(torch.get_device_module(device).is_available() for device in DEVICES)
        return "" if found else "torch finds no GPU"
    if tensor.device.type == "cpu" and interpreted():
        return ""
    if tensor.device.type == "cpu":
        return "the tensors are on cpu, where TRITON_INTERPRET=1 alone runs these kernels"
    if tensor.device.type not in DEVICES:
        return f"the tensors are on {tensor.device}"
    if tensor.device.type == "cuda" and torch.version.hip is None:
        capability = torch.cuda.get_device_capability(tensor.device)
        if capability < _OLDEST:
            return f"the GPU has compute capability {capability[0]}.{capability[1]}, and Triton wants 7.0"
    return ""


_TRITON = importlib.util.find_spec("triton") is not None
