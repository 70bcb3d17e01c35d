"""The C ABI from C: the compiled library against plain loops, for every instruction set that this machine has."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from involution.ops.backends import cpu_library

ROOT = Path(__file__).parents[3]
PROGRAM = ROOT / "tests" / "csrc" / "maps_against_loops.c"
LIBRARY = cpu_library.path()


def run(command: list[str], **variables: str) -> str:
    done = subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_library_agrees_with_loops_in_c(tmp_path: Path) -> None:
    compiler = shutil.which("cc")
    if compiler is None or LIBRARY is None:
        pytest.skip("no C compiler, or no compiled kernels")
    program = tmp_path / "check"
    flags = ["-std=gnu11", "-O2", "-I", str(ROOT / "csrc")]
    run([compiler, *flags, str(PROGRAM), "-o", str(program), str(LIBRARY), "-lm"])
    printed = run([str(program), "baseline"], LD_LIBRARY_PATH=str(LIBRARY.parent))
    assert printed.startswith("baseline: 0 of ")
    assert int(printed.split()[3]) > 1000


@pytest.mark.slow
def test_the_kernels_for_aarch64_agree_with_loops_in_an_emulator() -> None:
    for name in ("aarch64-linux-gnu-g++", "qemu-aarch64", "cmake", "ninja"):
        if shutil.which(name) is None:
            pytest.skip(f"no {name}")
    assert "baseline: 0 of " in run(["make", "-C", str(ROOT), "check-aarch64"])


@pytest.mark.slow
def test_the_kernels_for_windows_agree_with_loops_in_wine() -> None:
    for name in ("clang++", "ld.lld", "x86_64-w64-mingw32-g++-posix", "wine", "cmake", "ninja"):
        if shutil.which(name) is None:
            pytest.skip(f"no {name}")
    printed = run(["make", "-C", str(ROOT), "check-windows"])
    assert all(f"{name}: 0 of " in printed for name in ("baseline", "avx2"))
