"""The GPU kernels as their compilers see them: bounds on instructions, no spilled register, shared memory that fits.

Nothing runs: what a call would launch is compiled ahead of time for NVIDIA's and AMD's GPUs, and disassembled.
"""

from typing import Any, NamedTuple

import pytest
import torch
from harness import INTERPRETED
from torch import Tensor

from involution.bench import instructions, sass
from involution.bench.ahead_of_time import TARGETS, compile_launch
from involution.bench.cases import CASES
from involution.ops.backends import triton as gpu
from involution.ops.geometry import Geometry
from involution.ops.layouts import allocate

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(INTERPRETED, reason="an interpreted kernel is not compiled")

MAPS = ("apply", "adjoint", "correlate")
LAYOUTS = ("channels_last", "contiguous")
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
SHARED = {"sm_75": 64, "sm_86": 99, "sm_120": 99, "gfx942": 64, "gfx1100": 64}  # KiB that a program may have; or 163
EVERYWHERE = [pytest.param(target, marks=[] if target == "sm_80" else pytest.mark.slow) for target in TARGETS]


class Shape(NamedTuple):
    channels: int
    width: int  # channels of a group
    input: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]

    def geometry(self) -> Geometry:
        axes = zip(self.kernel, self.dilation, strict=True)
        padding = tuple(d * (k - 1) // 2 for k, d in axes)
        output = tuple(-(-size // s) for size, s in zip(self.input, self.stride, strict=True))
        groups = self.channels // self.width
        return Geometry(2, self.channels, groups, self.input, self.kernel, output, self.stride, padding, self.dilation)


def square(channels: int, size: int, kernel: int, stride: int = 1) -> Shape:
    return Shape(channels, 16, (size,) * 2, (kernel,) * 2, (stride,) * 2, (1, 1))


SHAPES = {
    "C64@56": square(64, 56, 7),
    "C32@112": square(32, 112, 3),
    "C128@56/2": square(128, 56, 7, 2),
    "C512@7": square(512, 7, 7),
    "C16@32": square(16, 32, 7),
    "1d": Shape(64, 16, (1001,), (31,), (1,), (2,)),
    "3d": Shape(32, 16, (9, 30, 31), (3, 3, 3), (1, 2, 2), (1, 1, 1)),
    "narrow": Shape(21, 3, (17, 19), (5, 5), (1, 1), (2, 2)),
    "wide": Shape(512, 256, (28, 28), (9, 9), (1, 1), (1, 1)),
    "width 1": Shape(64, 1, (56, 56), (7, 7), (1, 1), (1, 1)),
    "width 8": Shape(64, 8, (56, 56), (7, 7), (1, 1), (1, 1)),
    "one group": Shape(512, 512, (7, 7), (3, 3), (1, 1), (1, 1)),
}


def assert_fits(launch: gpu.Launch, tensors: list[torch.dtype | None], target: str) -> None:
    program = compile_launch(launch, tensors, target)
    assert program.spilled == 0, launch
    assert program.shared <= SHARED.get(target, 163) * 1024, launch


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("target", EVERYWHERE)
def test_nothing_spills_at_the_first_layer(target: str, layout: str) -> None:
    for dtype in DTYPES:
        for name in MAPS if target != "sm_80" or dtype == torch.float16 else ():
            launch = gpu.plan(name, SHAPES["C64@56"].geometry(), layout == "channels_last", dtype)[0]
            assert_fits(launch, [dtype] * 3, target)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["fp16", "fp32"])
@pytest.mark.parametrize("shape", SHAPES)
def test_nothing_spills(shape: str, dtype: torch.dtype, layout: str, target: str) -> None:
    for name in MAPS:
        launch = gpu.plan(name, SHAPES[shape].geometry(), layout == "channels_last", dtype)[0]
        assert_fits(launch, [dtype] * 3, target)


QUICK = [("C64@56", name, layout) for name in MAPS for layout in LAYOUTS]
QUICK += [("C128@56/2", "adjoint", layout) for layout in LAYOUTS]


@pytest.mark.parametrize(("case", "name", "layout"), QUICK)
def test_bounds_on_instructions(case: str, name: str, layout: str) -> None:
    row = instructions.counted(name, CASES[case], layout, torch.float16, "sm_80")
    assert instructions.broken([row]) == []
    # A multiply-add for every product, at most a third more for columns and taps beyond the image's or window's end.
    products = row["kinds"]["multiply-add"] + 0.5 * row["kinds"].get("add, multiply", 0.0)
    assert 1.0 <= products <= 1.5


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_86", "sm_90", "sm_100", "sm_120"])
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("case", CASES)
def test_bounds_on_instructions_everywhere(case: str, dtype: torch.dtype, target: str) -> None:
    rows = [instructions.counted(n, CASES[case], layout, dtype, target) for n in MAPS for layout in LAYOUTS]
    assert instructions.broken(rows) == []


def test_the_published_design_executes_more() -> None:
    for name in MAPS:
        ours = instructions.counted(name, CASES["C64@56"], "contiguous", torch.float16, "sm_80")
        theirs = instructions.counted(name, CASES["C64@56"], "contiguous", torch.float16, "sm_80", baseline=True)
        assert theirs["per multiply-add"] > 1.2 * ours["per multiply-add"], name


def test_a_broken_bound_is_said() -> None:
    row = {"what": "apply", "case": "C64@56", "layout": "contiguous", "dtype": "fp16", "target": "sm_80"}
    good = row | {"spilled": 0, "per multiply-add": 5.5}
    assert instructions.broken([good]) == []
    assert len(instructions.broken([good | {"per multiply-add": 5.6}, good | {"spilled": 8}])) == 2


def test_instructions_are_counted_by_kind_and_loop() -> None:
    program = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
    .L_x_0:
        /*0010*/              @!P0 LDG.E.U16 R2, [R4.64] ;
        /*0020*/                   HADD2.F32 R2, -RZ, R2.H0_H0 ;
        /*0030*/                   FFMA R3, R2, R2, R3 ;
        /*0040*/               @P0 BRA `(.L_x_0) ;
        /*0050*/                   STG.E.128 [R4.64], R8 ;
        /*0060*/                   EXIT ;
    .L_x_1:
        /*0070*/                   BRA `(.L_x_1);
        /*0080*/                   NOP;
    """
    counts = sass.count(program, [7])
    assert counts.kinds == {"move": 1, "load": 7, "convert": 7, "multiply-add": 7, "branch": 9, "store": 1}
    assert counts.bytes == 32 * (7 * 2 + 16)
    with pytest.raises(ValueError, match="nested loops"):
        sass.count(program, [])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("channels", "stride"), [(64, 1), (64, 2), (48, 2), (33, 2)])
def test_image_sizes_make_no_new_program(channels: int, stride: int, layout: str) -> None:
    """Programs are kept by their constants; sizes are none, nor may Triton specialise for them."""
    programs: dict[str, set[Any]] = {}
    width = 16 if channels % 16 == 0 else 3
    for size in (7, 8, 14, 32, 56, 57, 60, 99, 200):
        shape = Shape(channels, width, (size, size + 1), (7, 7), (stride, stride), (1, 1))
        for name in MAPS:
            launch = gpu.plan(name, shape.geometry(), layout == "channels_last", torch.float16)[0]
            kernel = gpu.kernel_of(launch)
            assert [kernel.arg_names[3 + i] in kernel.do_not_specialize for i in range(len(launch.numbers))] == [
                True
            ] * 7
            programs.setdefault(name, set()).add((*sorted(launch.constants.items()), *launch.blocks.items()))
    assert {name: len(found) for name, found in programs.items()} == dict.fromkeys(MAPS, 1)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_offsets_beyond_32_bits_compile(target: str) -> None:
    geometry = SHAPES["C64@56"].geometry()._replace(input=(2**13, 2**13), output=(2**13, 2**13))
    for name in MAPS:
        for channels_last in (True, False):
            launch = gpu.plan(name, geometry, channels_last, torch.float16)[0]
            assert launch.constants["WIDE"]
            assert_fits(launch, [torch.float16] * 3, target)


class Recorder:
    """A kernel that only notes its launches."""

    def __init__(self) -> None:
        self.launches: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int]) -> Any:
        return lambda *arguments, **constants: self.launches.append((grid, arguments, constants))


def dense(shape: tuple[int, ...], role: str, channels_last: bool) -> Tensor:
    like = torch.empty(2, 3, 4, 5)
    return allocate(role, shape, like.to(memory_format=torch.channels_last) if channels_last else like)


@pytest.mark.parametrize("channels_last", [True, False], ids=LAYOUTS)
def test_a_warm_call_decides_compiles_and_allocates_nothing(
    channels_last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a CUDA graph can capture it: the launch is all that happens."""
    shape = Shape(32, 16, (5, 6), (3, 3), (1, 1), (1, 1))
    geometry, kernel = shape.geometry(), Recorder()
    monkeypatch.setattr(gpu, "_kernel", lambda name: kernel)
    x, y = (dense((2, 32, 5, 6), "input", channels_last) for _ in range(2))
    k = dense((2, 2, 3, 3, 5, 6), "kernel_map", channels_last)

    def call() -> None:
        gpu.apply(x, k, y, geometry)
        gpu.adjoint(y, k, x, geometry)
        gpu.correlate(y, x, k, geometry)

    call()
    decided = gpu.plan.cache_info().misses

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a warm call must not allocate or wait")

    for owner, name in ((torch, "empty"), (torch.cuda, "synchronize"), (Tensor, "copy_"), (Tensor, "item")):
        monkeypatch.setattr(owner, name, refuse)
    call()
    assert gpu.plan.cache_info().misses == decided
    cold, warm = kernel.launches[:3], kernel.launches[3:]
    for first, second in zip(cold, warm, strict=True):
        assert first[0] == second[0]
        assert first[2] == second[2]
        # The tensors themselves are launched on, in the kernels' memory order.
        assert [t.data_ptr() for t in first[1][:3]] == [t.data_ptr() for t in second[1][:3]]
    assert [t.data_ptr() for t in warm[0][1][:3]] == [x.data_ptr(), k.data_ptr(), y.data_ptr()]


@pytest.mark.parametrize("gradient", ["expanded", "contiguous"])
def test_the_kernel_map_decides_the_layout(gradient: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gradient is brought to the map's layout, never the map to the gradient's."""
    shape = Shape(32, 16, (5, 6), (3, 3), (1, 1), (1, 1))
    kernel, started = Recorder(), []
    monkeypatch.setattr(gpu, "_kernel", lambda name: started.append(name) or kernel)
    x, k = dense((2, 32, 5, 6), "input", True), dense((2, 2, 3, 3, 5, 6), "kernel_map", True)
    g = torch.ones(()).expand(2, 32, 5, 6) if gradient == "expanded" else torch.ones(2, 32, 5, 6)
    gpu.adjoint(g, k, x, shape.geometry())
    gpu.correlate(g, x, k, shape.geometry())
    assert started == ["adjoint_channels_last", "correlate_channels_last"]
    assert kernel.launches[0][1][1].data_ptr() == kernel.launches[1][1][2].data_ptr() == k.data_ptr()
