"""Error messages of incomplete installations."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

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
