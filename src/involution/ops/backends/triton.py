"""The GPU backend: launches the Triton kernels of triton_*.py, on the tensors' device and its current stream.

With TRITON_INTERPRET=1 in the environment the same kernels run on CPU tensors, interpreted: slow, and for tests.
"""

import importlib
import importlib.util
import math
import os
from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..geometry import MAPS, Geometry
from ..layer import LayerParts, unpack
from ..layouts import map_is_channels_last, memory_order
from . import reference
from .triton_tiles import Tile, fused_tile, last_axis, power_of_two, residues, tiles

DEVICES = ("cuda", "xpu")  # "cuda" is AMD's too
_OLDEST = (7, 0)  # NVIDIA's compute capability that Triton compiles for
_ROLES = {map.name: (*map.takes, map.makes) for map in MAPS}
_MAP_AT_ONCE = 1 << 24  # elements of the kernel map in a fused layer's passes


class Launch(NamedTuple):
    """What a call launches: decided once for its sizes, layout and dtype, and cached."""

    kernel: str
    numbers: tuple[int, ...]  # the arguments after the tensors
    constants: dict[str, Any]
    tile: Tile
    blocks: dict[str, int]  # the constants that the tile decides
    programs: int


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
    """Runs a map's kernel; tensors of different layouts are first copied to one."""
    strides = tuple(tensor.stride() for tensor in tensors)
    for channels_last, wanted in enumerate(_dense_strides(name, geometry)):
        if strides == wanted:
            _launch(plan(name, geometry, bool(channels_last), tensors[2].dtype), tensors)
            return
    _call_in_the_maps_layout(name, tensors, geometry)


@lru_cache(maxsize=1024)
def _dense_strides(name: str, geometry: Geometry) -> tuple[tuple[tuple[int, ...], ...], ...]:
    """The strides of a map's three tensors where all are contiguous, and where all are channels-last."""
    sizes = {
        "input": (geometry.batch, geometry.channels, *geometry.input),
        "kernel_map": (geometry.batch, geometry.groups, *geometry.kernel, *geometry.output),
        "output": (geometry.batch, geometry.channels, *geometry.output),
    }
    roles, dims = _ROLES[name], len(geometry.input)
    contiguous = tuple(_strides(sizes[role], range(len(sizes[role]))) for role in roles)
    return contiguous, tuple(_strides(sizes[role], memory_order(role, dims)) for role in roles)


def _strides(size: Sequence[int], order: Sequence[int]) -> tuple[int, ...]:
    """The strides of a dense tensor whose axes lie in memory in this order, the last one innermost."""
    strides, distance = [0] * len(size), 1
    for axis in reversed(order):
        strides[axis] = distance
        distance *= size[axis]
    return tuple(strides)


def _call_in_the_maps_layout(name: str, tensors: Sequence[Tensor], geometry: Geometry) -> None:
    """Copies operands to the kernel map's layout, the largest's, and the result from it, where they have another."""
    roles, dims = _ROLES[name], len(geometry.input)
    channels_last = map_is_channels_last(tensors[roles.index("kernel_map")], tensors[int(name == "correlate")])
    if channels_last:
        tensors = [t.permute(memory_order(role, dims)) for t, role in zip(tensors, roles, strict=True)]
    first, second, out = tensors
    result = out if out.is_contiguous() else torch.empty(out.shape, dtype=out.dtype, device=out.device)
    _launch(plan(name, geometry, channels_last, out.dtype), (first.contiguous(), second.contiguous(), result))
    if result is not out:
        out.copy_(result)


@lru_cache(maxsize=1024)
def plan(name: str, geometry: Geometry, channels_last: bool, dtype: torch.dtype) -> tuple[Launch, ...]:
    """The launches that a map can choose from, one per tile of triton_tiles.tiles; the first is the default."""
    layout = "channels_last" if channels_last else "contiguous"
    return tuple(
        _map_launch(f"{name}_{layout}", name, geometry, channels_last, tile)
        for tile in tiles(name, geometry, channels_last, dtype)
    )


def _map_launch(kernel: str, name: str, geometry: Geometry, channels_last: bool, tile: Tile) -> Launch:
    axis = last_axis(name, geometry, tile.columns)
    window = {axes.upper(): _three(getattr(geometry, axes), int(axes != "padding")) for axes in _WINDOW}
    width = geometry.channels // geometry.groups
    constants = {"width": width} | window | {"DIMS": len(geometry.input), "CHUNKS": axis.chunks}
    constants["WIDE"] = _is_wide(geometry)
    made, classes = geometry.output, 1
    if name == "adjoint":
        axes = [
            residues(stride, dilation) for stride, dilation in zip(window["STRIDE"], window["DILATION"], strict=True)
        ]
        constants |= dict(zip(("STEP", "BACK", "INVERSE"), zip(*axes, strict=True), strict=True))
        del constants["DILATION"]
        made = tuple(-(-size // stride) for size, stride in zip(geometry.input, geometry.stride, strict=True))
        classes = math.prod(map(min, geometry.input, geometry.stride))
    blocks = {"BLOCKS": tile.blocks, "COLUMNS": tile.columns, "WIDTH": tile.width, "UNIT": axis.unit}
    groups = geometry.groups
    if channels_last:
        constants["groups"] = groups
        blocks["GROUPS"] = tile.groups
        groups = -(-groups // tile.groups)
    of_image = math.prod(made[:-1]) * -(-made[-1] // tile.columns)
    parts = 1 if name == "correlate" else -(-width // tile.width)
    programs = -(-of_image // tile.blocks) * parts * groups * classes * geometry.batch
    rows = math.prod(geometry.kernel[:-1]) * axis.chunks
    sizes = (*_three(geometry.input, 1), *_three(geometry.output, 1), rows)
    return Launch(kernel, sizes, constants, tile, blocks, programs)


_WINDOW = ("kernel", "stride", "padding", "dilation")


def _is_wide(geometry: Geometry) -> bool:
    """Whether offsets in an image, positions in or around it, or products of residues exceed 32 bits."""
    inputs, outputs, taps = (math.prod(axes) for axes in (geometry.input, geometry.output, geometry.kernel))
    reach = math.prod(
        output * stride + (kernel - 1) * dilation + padding
        for output, stride, kernel, dilation, padding in zip(
            geometry.output, geometry.stride, geometry.kernel, geometry.dilation, geometry.padding, strict=True
        )
    )
    largest = max(geometry.channels * max(inputs, outputs), geometry.groups * taps * outputs, 2 * reach)
    return max(largest, max(geometry.stride) ** 2) >= 2**31


def _three(axes: Sequence[int], missing: int) -> tuple[int, ...]:
    return (*(missing,) * (3 - len(axes)), *axes)


def _launch(choice: Sequence[Launch], tensors: Sequence[Tensor | None]) -> None:
    """Runs a kernel on the tensors' device, which is the current device meanwhile."""
    device = next(tensor.device for tensor in tensors if tensor is not None)
    if device.type == "cpu" or device.index == torch.accelerator.current_device_index():
        _start(choice, tensors, device)
    else:
        with torch.accelerator.device_index(device.index):
            _start(choice, tensors, device)


def _start(choice: Sequence[Launch], tensors: Sequence[Tensor | None], device: torch.device) -> None:
    launch = choice[0]
    if _AUTOTUNE and not interpreted():
        programs = {tuple(some.blocks.values()): some.programs for some in choice}
        tuned = _tuned(launch.kernel, tuple((some.tile, tuple(some.blocks.items())) for some in choice))
        size = math.prod(launch.numbers[:3]).bit_length()  # image sizes within a factor of two are one class
        tuned[lambda meta: (programs[tuple(meta[name] for name in launch.blocks)],)](
            *tensors, *launch.numbers, **launch.constants, TUNED_FOR=f"{_device_name(device)}, 2^{size}"
        )
    else:
        compiler = _compiler_options(launch.tile, device)
        kernel = _kernel(launch.kernel)
        kernel[(launch.programs,)](*tensors, *launch.numbers, **launch.constants, **launch.blocks, **compiler)


_AUTOTUNE = os.environ.get("INVOLUTION_AUTOTUNE") == "1"


@cache
def _compiler_options(tile: Tile, device: torch.device) -> dict[str, int]:
    return compiler_options(tile, device.type == "cuda" and torch.version.hip is None)


def compiler_options(tile: Tile, nvidia: bool) -> dict[str, int]:
    """A tile's warps and registers as options of Triton's compiler."""
    return {"num_warps": tile.warps} | ({"maxnreg": tile.registers} if nvidia and tile.registers else {})


def kernel_of(launch: Launch) -> Any:
    """The Triton kernel of a launch."""
    return _kernel(launch.kernel)


_FILES = {"contiguous": "triton_contiguous", "channels_last": "triton_channels_last", "fused_kernel": "triton_fused"}


@cache
def _kernel(name: str) -> Any:
    """A kernel by its name. Importing its module loads Triton."""
    file = next(file for end, file in _FILES.items() if name.endswith(end))
    return getattr(importlib.import_module(f".{file}", __package__), name)


@cache
def _tuned(name: str, choice: tuple[tuple[Tile, tuple[tuple[str, int], ...]], ...]) -> Any:
    """The kernel with the fastest of the tiles, found at the first call with such a window, size and device."""
    import triton

    nvidia = torch.version.hip is None and torch.cuda.is_available()
    configs = [triton.Config(dict(blocks), **compiler_options(tile, nvidia)) for tile, blocks in choice]
    kernel = _kernel(name)
    key = [argument for argument in kernel.arg_names if argument in _TUNED_BY]
    return triton.autotune(configs, key=key, cache_results=True)(kernel)


_TUNED_BY = ("groups", "width", "KERNEL", "STRIDE", "DILATION", "BACK", "TUNED_FOR")


@cache
def _device_name(device: torch.device) -> str:
    return str(torch.get_device_module(device).get_device_name(device))


def fused_layer(parts: LayerParts, outs: Sequence[Tensor], geometry: Geometry) -> None:
    """See reference.fused_layer. One kernel where that is faster, else the kernel map is generated, then applied."""
    fits = can_fuse(geometry, parts.input.dtype, parts.span_weight.shape[1])
    reference.fused_layer(parts, outs, geometry, _fused if fits and fusing_wins(parts.input.device) else _in_steps)


_FUSING_WINS = ((8, 6), (8, 9), (12, 0))


@cache
def fusing_wins(device: torch.device) -> bool:
    """Whether the fused kernel is faster than its two steps, which write the kernel map to memory and read it again.

    Estimated from the instructions counted for sm_80 and the datasheets' rates: it is on consumer cards, whose memory
    is slow for their arithmetic. On A100, H100 and B200 the steps are faster; below sm_80 the matrix units do not help.
    """
    if device.type == "cpu":  # interpreted
        return True
    return device.type == "cuda" and torch.version.hip is None and _capability(device) in _FUSING_WINS


def can_fuse(geometry: Geometry, dtype: torch.dtype, features: int) -> bool:
    """Whether the fused kernel supports such a layer: a tile's hidden features must fit the registers."""
    most = {2: 256, 4: 128}.get(dtype.itemsize, 0)
    return features <= min(most, 16 * geometry.groups)


def _in_steps(parts: LayerParts, hidden: Tensor, y: Tensor, geometry: Geometry) -> Tensor:
    return reference.in_steps(parts, hidden, y, geometry, apply)


def _fused(parts: LayerParts, hidden: Tensor, y: Tensor, geometry: Geometry) -> Tensor:
    """Runs the fused kernel, on channels-last tensors."""
    x, features = (image.movedim(1, -1).contiguous() for image in (parts.input, hidden))
    in_memory = y.movedim(1, -1)
    result = in_memory if in_memory.is_contiguous() else torch.empty(in_memory.shape, dtype=y.dtype, device=y.device)
    weight = unpack(parts.span_weight, parts.span_bias).contiguous()
    vectors = (None if t is None else t.contiguous() for t in (parts.span_bias, parts.scale, parts.shift))
    tf32 = x.device.type == "cuda" and torch.version.hip is None and _tf32()
    launch = fused_plan(geometry, y.dtype, features.shape[-1], parts.relu, tf32)
    _launch([launch], (x, features, weight, *vectors, result))
    return y if result is in_memory else result.movedim(-1, 1)


@lru_cache(maxsize=1024)
def fused_plan(geometry: Geometry, dtype: torch.dtype, features: int, relu: bool, tf32: bool) -> Launch:
    """The launch of the fused kernel."""
    tile = fused_tile(geometry, dtype, features)
    window = {axes.upper(): _three(getattr(geometry, axes), int(axes != "padding")) for axes in _WINDOW}
    constants = window | {
        "features": features,
        "groups": geometry.groups,
        "width": geometry.channels // geometry.groups,
        "DIMS": len(geometry.input),
        "WIDE": _is_wide(geometry),
        "HIDDEN": max(16, power_of_two(features)),
        "RELU": relu,
        "PRECISION": "tf32" if tf32 else "ieee",
        "UPCAST": interpreted(),
    }
    blocks = {"BLOCKS": tile.blocks, "GROUPS": tile.groups, "WIDTH": tile.width}
    width = geometry.channels // geometry.groups
    of_image = -(-math.prod(geometry.output) // tile.blocks) * -(-geometry.groups // tile.groups)
    sizes = (*_three(geometry.input, 1), *_three(geometry.output, 1), math.prod(geometry.kernel[:-1]))
    programs = of_image * -(-width // tile.width) * geometry.batch
    return Launch("fused_kernel", sizes, constants, tile, blocks, programs)


def _tf32() -> bool:
    """Whether products of float32 matrices may be rounded, by torch's newer switch or its older one."""
    switch: str = getattr(torch.backends.cuda.matmul, "fp32_precision", "none")
    return switch == "tf32" or (switch == "none" and torch.get_float32_matmul_precision() != "highest")


def fused_layer_backward(grad: Tensor, parts: LayerParts, results: Sequence[Tensor], geometry: Geometry) -> None:
    """See reference.fused_layer_backward. The map is recomputed for some images at a time."""
    image = geometry.groups * math.prod(geometry.kernel) * math.prod(geometry.output)
    reference.fused_layer_backward(grad, parts, results, geometry, (adjoint, correlate), max(1, _MAP_AT_ONCE // image))


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
        capability = _capability(tensor.device)
        if capability < _OLDEST:
            return f"the GPU has compute capability {capability[0]}.{capability[1]}, and Triton wants 7.0"
    return ""


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


_TRITON = importlib.util.find_spec("triton") is not None
