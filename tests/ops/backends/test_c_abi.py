"""The C ABI from C: random calls against plain loops on guarded memory, for every instruction set of this CPU."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from harness import INSTRUCTION_SETS, examples

from involution.ops.backends import cpu_library

ROOT = Path(__file__).parents[3]
SOURCES = ROOT / "tests" / "csrc"
LIBRARY = cpu_library.path()
FAULTS = {
    1: "apply: ",
    2: "crashed in this case:\napply f32 ",
    3: "crashed in this case:\napply f32 ",
    4: "",  # at the protected page a crash, else the bytes beside the buffer are changed
    5: "",
    6: "crashed in this case:\napply f32 ",
    7: "apply: ",
    8: "other threads",
}


def run(command: list[str], **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True, check=False)


def compiled(folder: Path, source: str, *flags: str) -> Path:
    compiler = shutil.which("cc")
    if compiler is None or LIBRARY is None:
        pytest.skip("no C compiler, or no compiled kernels")
    result = folder / source.partition(".")[0]
    options = ["-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-I", str(ROOT / "csrc"), *flags]
    done = run([compiler, *options, str(SOURCES / source), "-o", str(result), str(LIBRARY), "-lm"])
    assert done.returncode == 0, done.stderr
    return result


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled(tmp_path_factory.mktemp("csrc"), "random_calls.c")


def random_calls(program: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    assert LIBRARY is not None
    return run([str(program), *arguments], LD_LIBRARY_PATH=str(LIBRARY.parent), **variables)


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
def test_random_calls_agree_with_loops(program: Path, instruction_set: str) -> None:
    count = examples(2000)
    first = 3_000_000 + 100_000 * INSTRUCTION_SETS.index(instruction_set)
    done = random_calls(program, "--isa", instruction_set, "--first", str(first), str(count))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == f"{instruction_set}: {count} cases agree\n"


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
def test_the_corpus_agrees(program: Path, instruction_set: str) -> None:
    corpus = SOURCES / "corpus.txt"
    cases = [line for line in corpus.read_text().splitlines() if line and not line.startswith("#")]
    done = random_calls(program, "--isa", instruction_set, "--replay", str(corpus))
    assert done.stdout == f"{instruction_set}: {len(cases)} cases agree\n", done.stdout + done.stderr


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_noticed_and_its_case_fails_again(program: Path, fault: int, tmp_path: Path) -> None:
    """The driver on a function with one fault: it ends with 1 or a crash, and with a line that repeats it."""
    faulty = compiled(tmp_path, "faults.c", "-shared", "-fPIC", f"-DFAULT={fault}")
    found = random_calls(program, "3000", LD_PRELOAD=str(faulty))
    printed = found.stdout + found.stderr
    assert found.returncode != 0, printed
    assert FAULTS[fault] in printed
    line = next(line for line in printed.splitlines() if line.startswith("apply f32 "))
    (tmp_path / "case.txt").write_text(line + "\n")
    again = random_calls(program, "--replay", str(tmp_path / "case.txt"), LD_PRELOAD=str(faulty))
    assert again.returncode != 0
    assert line in again.stdout + again.stderr
    assert random_calls(program, "--replay", str(tmp_path / "case.txt")).returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize("target", ["check-aarch64", "valgrind"])
def test_the_driver_elsewhere(target: str) -> None:
    """The kernels for another processor in an emulator; and undefined values under valgrind."""
    for name in ("aarch64-linux-gnu-g++", "qemu-aarch64", "valgrind", "cmake", "ninja"):
        if shutil.which(name) is None:
            pytest.skip(f"no {name}")
    assert "cases agree" in run(["make", "-C", str(ROOT), target]).stdout


@pytest.mark.slow
def test_the_kernels_for_windows_agree_with_loops_in_wine() -> None:
    for name in ("clang++", "ld.lld", "x86_64-w64-mingw32-g++-posix", "wine", "cmake", "ninja"):
        if shutil.which(name) is None:
            pytest.skip(f"no {name}")
    printed = run(["make", "-C", str(ROOT), "check-windows", "CASES=2000"]).stdout
    assert all(f"{name}: 2000 cases agree" in printed for name in ("baseline", "avx2"))
