"""The GPU kernels as their compilers see them: no spilled registers, shared memory that fits, loads of 16 bytes.

Nothing runs: what the backend would launch is recorded, and compiled ahead of time for NVIDIA's sm_80, sm_90 and sm_100
and AMD's gfx942.
"""

import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from harness import INTERPRETED
from torch import Tensor

from involution.ops.backends import triton as gpu
from involution.ops.backends.triton import Tile
from involution.ops.geometry import Geometry, geometry
from involution.ops.layer import LayerParts
from involution.ops.layouts import allocate

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(INTERPRETED, reason="an interpreted kernel is not compiled")

TYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64"}
SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024, "gfx942": 64 * 1024}  # bytes a program may have
SIXTEEN_BYTES = {"cuda": r"ld\.global\S*\.(?:v4\.b32|v2\.b64)", "hip": r"(?:global|buffer)_load_dwordx4"}


class Shape(NamedTuple):
    channels: int
    width: int  # channels of a group
    input: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]


def square(channels: int, size: int, kernel: int, stride: int = 1) -> Shape:
    return Shape(channels, 16, (size,) * 2, (kernel,) * 2, (stride,) * 2, (1, 1))


# RedNet-50's first layer; then all that make other programs: its other windows and alignments, the detector's neck, and
# shapes that no network has.
FIRST = {"C64@56": square(64, 56, 7)}
OTHERS = {
    "C32@112": square(32, 112, 3),
    "C128@56/2": square(128, 56, 7, 2),
    "C256@14": square(256, 14, 7),
    "C512@14/2": square(512, 14, 7, 2),
    "C512@7": square(512, 7, 7),
    "C16@32": square(16, 32, 7),
    "neck": Shape(256, 16, (200, 304), (7, 7), (1, 1), (1, 1)),
    "1d": Shape(64, 16, (1001,), (31,), (1,), (2,)),
    "3d": Shape(32, 16, (9, 30, 31), (3, 3, 3), (1, 2, 2), (1, 1, 1)),
    "narrow": Shape(21, 3, (17, 19), (5, 5), (1, 1), (2, 2)),
    "wide": Shape(512, 256, (28, 28), (9, 9), (1, 1), (1, 1)),
    **{f"width {w}": Shape(64, w, (56, 56), (7, 7), (1, 1), (1, 1)) for w in (1, 2, 4, 8)},
    "256 features": square(1024, 14, 7),
    "one group": Shape(1024, 1024, (7, 7), (3, 3), (1, 1), (1, 1)),
}
MANY = [pytest.param(shape, id=name) for name, shape in FIRST.items()]
MANY += [pytest.param(shape, id=name, marks=pytest.mark.slow) for name, shape in OTHERS.items()]


class Launch(NamedTuple):
    name: str
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    tile: Tile


def launches(call: Callable[[], object]) -> list[Launch]:
    """What a call of the backend would launch."""
    seen: list[Launch] = []

    class Recorder:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, grid: Any) -> Callable[..., None]:
            return lambda *arguments, tile, **constants: seen.append(Launch(self.name, arguments, constants, tile))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "_kernel", Recorder)
        patch.setattr(gpu, "compiler_options", lambda tile, nvidia: {"tile": tile})
        call()
    return seen


def of_maps(shape: Shape, dtype: torch.dtype, channels_last: bool) -> list[Launch]:
    x, k, y, sizes = tensors(shape, dtype, channels_last)

    def call() -> None:
        gpu.apply(x, k, y, sizes)
        gpu.adjoint(y, k, x, sizes)
        gpu.correlate(y, x, k, sizes)

    return launches(call)


def of_layer(shape: Shape, dtype: torch.dtype, options: bool) -> list[Launch]:
    """With hidden features of a quarter of the channels, as RedNet has them."""
    x, k, y, sizes = tensors(shape, dtype, True)
    hidden = allocate("input", (2, max(1, shape.channels // 4), *sizes.output), like=x)
    taps = k[0, ..., *[0] * len(shape.kernel)].numel()
    weight = x.new_empty(taps, hidden.shape[1])
    vectors = [x.new_empty(size) if options else None for size in (taps, shape.channels, shape.channels)]
    parts = LayerParts(x, hidden, None, None, weight, *vectors, relu=options)
    return launches(lambda: gpu.fused_layer(parts, [y], sizes))


def tensors(shape: Shape, dtype: torch.dtype, channels_last: bool) -> tuple[Tensor, Tensor, Tensor, Geometry]:
    padding = tuple(d * (k - 1) // 2 for k, d in zip(shape.kernel, shape.dilation, strict=True))
    output = tuple(-(-size // s) for size, s in zip(shape.input, shape.stride, strict=True))
    x = torch.empty(2, *shape.input, shape.channels, dtype=dtype).movedim(-1, 1)
    x = x if channels_last else x.contiguous()
    sizes = {
        "input": (2, shape.channels, *shape.input),
        "kernel_map": (2, shape.channels // shape.width, *shape.kernel, *output),
        "output": (2, shape.channels, *output),
    }
    k, y = (allocate(role, sizes[role], like=x) for role in ("kernel_map", "output"))
    return x, k, y, geometry(sizes, shape.stride, padding, shape.dilation)


class Compiled(NamedTuple):
    code: str  # PTX, or AMD's assembly
    spilled: int
    shared: int  # bytes


def compile_for(target: int | str, launch: Launch, folder: Path) -> Compiled:
    """Compiles what a launch would, by Triton's own rules for what is a constant and what is aligned."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from involution.ops.backends import triton_kernels

    kernel = getattr(triton_kernels, launch.name)
    compiler_options = gpu.compiler_options(launch.tile, isinstance(target, int))
    given = dict(zip(kernel.arg_names, launch.arguments, strict=False)) | launch.constants
    fixed = {name for name in kernel.arg_names if name in triton_kernels._SIZES}
    signature: dict[str, str] = {}
    values, aligned = {}, {}
    for index, name in enumerate(kernel.arg_names):
        value = given[name]
        if isinstance(value, Tensor):
            signature[name] = f"*{TYPES[value.dtype]}"
        elif name in (*launch.constants, "width") or value is None or (value == 1 and name not in fixed):
            signature[name] = "constexpr"
            values[(index,)] = value
            continue
        else:
            signature[name] = "i32" if value < 2**31 else "i64"
        if isinstance(value, Tensor) or (value % 16 == 0 and name not in fixed):
            aligned[(index,)] = [["tt.divisibility", 16]]
    nvidia = isinstance(target, int)
    made = triton.compile(
        ASTSource(kernel, signature, values, aligned),
        target=GPUTarget("cuda", target, 32) if nvidia else GPUTarget("hip", target, 64),
        options=compiler_options,
    )
    code = made.asm["ptx" if nvidia else "amdgcn"]
    spilled = spilled_by_ptxas(code, target, folder) if nvidia else spilled_by_llvm(code)
    return Compiled(code, spilled, made.metadata.shared)


def spilled_by_ptxas(ptx: str, target: int | str, folder: Path) -> int:
    """Bytes, as `ptxas -v` reports them; sm_100 has an assembler of its own."""
    nvidia = triton.knobs.nvidia
    assembler = (nvidia.ptxas_blackwell if target == 100 else nvidia.ptxas).path
    file = folder / "kernel.ptx"
    file.write_text(ptx)
    found = re.search(r"\.target (sm_\w+)", ptx)
    assert found
    command = [assembler, "-v", f"--gpu-name={found[1]}", str(file), "-o", str(folder / "kernel.cubin")]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return sum(int(number) for number in re.findall(r"(\d+) bytes spill (?:stores|loads)", report))


def spilled_by_llvm(assembly: str) -> int:
    """Registers, as the assembly's own notes have them."""
    counts = re.findall(r"\.[sv]gpr_spill_count:\s*(\d+)", assembly)
    assert len(counts) == 2
    return sum(int(count) for count in counts)


targets = pytest.mark.parametrize("target", SHARED)


@targets
@pytest.mark.parametrize("channels_last", [True, False], ids=["channels_last", "contiguous"])
@pytest.mark.parametrize("dtype", TYPES, ids=TYPES.values())
@pytest.mark.parametrize("shape", MANY)
def test_maps(shape: Shape, dtype: torch.dtype, channels_last: bool, target: int | str, tmp_path: Path) -> None:
    found = of_maps(shape, dtype, channels_last)
    assert [launch.name for launch in found] == ["apply_kernel", "adjoint_kernel", "correlate_kernel"]
    for launch in found:
        compiled = compile_for(target, launch, tmp_path)
        assert compiled.spilled == 0, launch.name
        assert compiled.shared <= SHARED[target], launch.name
        if channels_last and shape.width % 16 == 0:
            assert_loads_are_wide(compiled.code, target, launch.name, min(8, shape.kernel[-1]))


@targets
@pytest.mark.parametrize("options", [False, True], ids=["plain", "bias, norm, relu"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("shape", MANY)
def test_layer(shape: Shape, dtype: torch.dtype, options: bool, target: int | str, tmp_path: Path) -> None:
    (launch,) = of_layer(shape, dtype, options)
    # More than sixteen features a group, or more than a tile's registers hold: the map is stored.
    if shape.width > 64 or shape.channels // 4 > (256 if dtype.itemsize == 2 else 128):
        assert launch.name == "apply_kernel"
        return
    assert launch.name == "fused_kernel"
    compiled = compile_for(target, launch, tmp_path)
    assert compiled.spilled == 0
    assert compiled.shared <= SHARED[target]
    if (
        shape.channels >= 32 and shape.width % 16 == 0
    ):  # a single group's tile has fewer numbers than AMD's lanes could take
        assert_loads_are_wide(compiled.code, target, launch.name, 1)


def assert_loads_are_wide(code: str, target: int | str, name: str, most: int) -> None:
    """At least `most` loads are of 16 bytes: the image's, one for every tap of an unrolled row."""
    assert len(re.findall(SIXTEEN_BYTES["cuda" if isinstance(target, int) else "hip"], code)) >= most, name


@pytest.mark.parametrize("channels_last", [True, False], ids=["channels_last", "contiguous"])
@pytest.mark.parametrize(("channels", "stride"), [(64, 1), (64, 2), (48, 2), (33, 2)])
def test_image_sizes_make_no_new_program(channels: int, stride: int, channels_last: bool) -> None:
    """Programs are kept by their constants and by which numbers are 1 or multiples of 16."""
    from involution.ops.backends import triton_kernels

    programs: dict[str, set[Any]] = {}
    for size in (7, 8, 14, 32, 56, 57, 60, 99, 200):
        width = 16 if channels % 16 == 0 else 3
        shape = Shape(channels, width, (size, size + 1), (7, 7), (stride, stride), (1, 1))
        for launch in of_maps(shape, torch.float16, channels_last) + of_layer(shape, torch.float16, True):
            names = getattr(triton_kernels, launch.name).arg_names
            numbers = {n: a for n, a in zip(names, launch.arguments, strict=False) if isinstance(a, int)}
            traits = [(n, a == 1, a % 16 == 0) for n, a in numbers.items() if n not in triton_kernels._SIZES]
            programs.setdefault(launch.name, set()).add((*traits, *sorted(launch.constants.items())))
    assert len(programs) == 4
    assert {name: len(found) for name, found in programs.items()} == dict.fromkeys(programs, 1)


@targets
def test_distances_beyond_32_bits_compile(target: int | str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "_is_wide", lambda sizes: True)
    for launch in [*of_maps(FIRST["C64@56"], torch.float16, True), *of_layer(FIRST["C64@56"], torch.float16, True)]:
        assert compile_for(target, launch, tmp_path).spilled == 0
