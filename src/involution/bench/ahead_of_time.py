"""Compiles the GPU kernels ahead of time, exactly as a launch would, for GPUs that need not be there."""

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..ops.backends import triton as gpu

TARGETS: dict[str, int | str] = {
    **{f"sm_{number}": number for number in (75, 80, 86, 90, 100, 120)},
    **{name: name for name in ("gfx942", "gfx1100")},
}
_TYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64"}
_WAVE_64 = ("gfx9",)  # AMD's data-centre GPUs have warps of 64 lanes, its others of 32


class Program(NamedTuple):
    """A compiled kernel."""

    assembly: str  # SASS on NVIDIA, else AMD's assembly
    intermediate: str  # PTX on NVIDIA
    registers: int  # of a thread
    spilled: int  # bytes of NVIDIA's stores and loads, or AMD's registers
    shared: int  # bytes of shared memory


def compile_launch(launch: gpu.Launch, tensors: list[torch.dtype | None], target: str) -> Program:
    """Compiles what `launch` would launch on tensors of these dtypes, which begin at multiples of 16 bytes.

    Args:
        launch: of triton.plan.
        tensors: dtypes of the kernel's first arguments; None for an argument that is absent.
        target: a key of TARGETS.

    Raises:
        ValueError: the target is not one of TARGETS.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if target not in TARGETS:
        raise ValueError(f"target must be one of {', '.join(TARGETS)}, got {target!r}")
    architecture = TARGETS[target]
    nvidia = isinstance(architecture, int)
    if launch.kernel.endswith("one_thread"):
        from . import one_thread

        kernel = getattr(one_thread, launch.kernel)
    else:
        kernel = gpu.kernel_of(launch)
    signature, values, traits = _specialised(kernel, launch, tensors, nvidia)
    lanes = 64 if target.startswith(_WAVE_64) else 32
    compiled = triton.compile(
        ASTSource(kernel, signature, values, traits),
        target=GPUTarget("cuda" if nvidia else "hip", architecture, lanes),
        options=gpu.compiler_options(launch.tile, nvidia),
    )
    shared = compiled.metadata.shared
    if nvidia:
        return _nvidia_program(compiled.asm["ptx"], architecture, shared)
    assembly = compiled.asm["amdgcn"]
    registers = re.search(r"\.vgpr_count:\s*(\d+)", assembly)
    spilled = re.findall(r"\.[sv]gpr_spill_count:\s*(\d+)", assembly)
    if registers is None or len(spilled) != 2:
        raise RuntimeError(f"{target}'s assembly must say its registers and spills, got none for {launch.kernel}")
    return Program(assembly, assembly, int(registers[1]), sum(map(int, spilled)), shared)


def _specialised(
    kernel: Any, launch: gpu.Launch, tensors: list[torch.dtype | None], nvidia: bool
) -> tuple[dict[str, str], dict[tuple[int], Any], dict[tuple[int], list[list[Any]]]]:
    """Types, constants and alignments of a kernel's arguments, by the rules of Triton's launches."""
    constants = launch.constants | launch.blocks | {"TUNED_FOR": ""}
    signature: dict[str, str] = {}
    values, traits = {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants or (index < len(tensors) and tensors[index] is None):
            signature[name] = "constexpr"
            values[(index,)] = constants.get(name)
        elif index < len(tensors):
            signature[name] = f"*{_TYPES[tensors[index]]}"  # type: ignore[index]
            # AMD's launches of tensors below 2 GiB say that offsets have 32 bits.
            traits[(index,)] = [["tt.divisibility", 16]] + ([] if nvidia else [["tt.pointer_range", 32]])
        else:
            value = launch.numbers[index - len(tensors)]
            signature[name] = "i32" if value < 2**31 else "i64"
            if value % 16 == 0 and index not in kernel.do_not_specialize and name not in kernel.do_not_specialize:
                traits[(index,)] = [["tt.divisibility", 16]]
    return signature, values, traits


def _nvidia_program(ptx: str, architecture: int | str, shared: int) -> Program:
    """Assembles PTX for what ptxas reports, and disassembles the result."""
    import triton

    nvidia = triton.knobs.nvidia
    assembler = (nvidia.ptxas_blackwell if architecture in (100, 120) else nvidia.ptxas).path
    found = re.search(r"\.target (sm_\w+)", ptx)
    assert found
    with tempfile.TemporaryDirectory() as folder:
        source, binary = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
        source.write_text(ptx)
        command = [assembler, "-v", f"--gpu-name={found[1]}", str(source), "-o", str(binary)]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        disassembler = nvidia.nvdisasm.path
        sass = subprocess.run([disassembler, "-c", str(binary)], capture_output=True, text=True, check=True).stdout
    registers = re.search(r"Used (\d+) registers", report)
    assert registers
    spilled = sum(int(number) for number in re.findall(r"(\d+) bytes spill (?:stores|loads)", report))
    return Program(sass, ptx, int(registers[1]), spilled, shared)
