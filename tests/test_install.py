"""Error messages of incomplete installations."""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from involution.ops import OLDEST_TORCH

ROOT = Path(__file__).resolve().parents[1]


def test_without_a_compiler_the_error_names_the_variable(tmp_path: Path) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("cmake", "ninja", "uname"):
        if shutil.which(name) is None:
            pytest.skip(f"no {name}")
        (programs / name).symlink_to(str(shutil.which(name)))
    command = [str(programs / "cmake"), "-G", "Ninja", "-S", str(ROOT), "-B", str(tmp_path / "build")]
    done = subprocess.run(command, env={"PATH": str(programs)}, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "INVOLUTION_NATIVE=0 pip install ." in " ".join(done.stderr.split())


def test_the_zoo_without_timm_names_the_extra() -> None:
    program = "import sys; sys.modules['timm'] = None; import involution.zoo"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.strip().endswith("involution.zoo needs timm, not installed here: pip install 'involution[zoo]'")


def fails(program: str) -> str:
    """The last line on stderr of a program that exits with 1."""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    return done.stderr.strip().splitlines()[-1]


COMMAND = "from involution.cli import main; sys.exit(main(['doctor']))"


@pytest.mark.parametrize("use", ["import involution; involution.Involution2d", COMMAND], ids=["import", "command"])
def test_without_torch_the_error_says_what_to_install(use: str) -> None:
    wanted = "involution needs torch, not installed here: pip install torch (for the CPU alone: see docs/install.md)"
    assert fails(f"import sys; sys.modules['torch'] = None; {use}").endswith(wanted)


@pytest.mark.parametrize("use", ["import involution; involution.Involution2d", COMMAND], ids=["import", "command"])
def test_a_torch_that_is_too_old_is_named(use: str) -> None:
    last = fails(f"import sys, torch; torch.__version__ = '2.4.1+cpu'; {use}")
    assert last.endswith("involution needs torch 2.10 or later, got 2.4.1+cpu")


def test_the_oldest_torch_is_the_projects() -> None:
    [torch] = [
        one for one in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"] if "torch" in one
    ]
    assert re.fullmatch(r"torch>=(\d+)\.(\d+)", torch).groups() == tuple(map(str, OLDEST_TORCH))
