"""The choice of a backend, the reasons of the others, and installations without kernels."""

import os
import subprocess
import sys
import warnings

import pytest
import torch
from harness import INSTRUCTION_SETS, backend

import involution
from involution.ops.backends import cpu, selection


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )


def call() -> tuple[torch.Tensor, torch.Tensor, int, int]:
    return torch.randn(1, 4, 5, 5), torch.randn(1, 2, 3, 3, 5, 5), 1, 1


def test_records_of_a_call() -> None:
    records = involution.backends(*call())
    assert [(r.name, r.serves) for r in records] == [("cpu", True), ("triton", False), ("reference", False)]
    assert records[0].available
    assert records[0].reason == ""
    assert "tensors are on cpu" in records[1].reason
    assert "preferred" in records[2].reason
    with backend("reference"):
        records = involution.backends(*call())
        assert [r.serves for r in records] == [False, False, True]
        assert "INVOLUTION_BACKEND=reference" in records[0].reason


def test_records_without_a_call() -> None:
    cpu_kernels, triton, reference = involution.backends()
    assert all(r.available and r.serves and not r.reason for r in (cpu_kernels, reference))
    if not torch.accelerator.is_available():
        assert (triton.available, triton.serves, triton.reason) == (False, False, "torch finds no GPU")


def test_records_of_tensors_on_another_device() -> None:
    x, k, *window = call()
    records = involution.backends(x.to("meta"), k.to("meta"), *window)
    assert [r.serves for r in records] == [False, False, True]
    assert all("meta" in record.reason for record in records[:2])


def test_a_bad_call_has_the_public_functions_error() -> None:
    x, k, *_ = call()
    with pytest.raises(TypeError, match="kernel_map"):
        involution.backends(x, 3)
    with pytest.raises(ValueError, match="one to three spatial axes"):
        involution.backends(x, x)
    with pytest.raises(TypeError, match="one dtype"):
        involution.backends(x, k.double(), padding=1)
    with pytest.raises(ValueError, match=r"spatial sizes \[3, 3\]"):
        involution.backends(x, k)
    with pytest.raises(TypeError, match="pad"):
        involution.backends(x, k, pad=1)


def test_an_unbatched_call_and_keywords() -> None:
    x, k, *_ = call()
    assert involution.backends(x[0], k[0], padding=1) == involution.backends(x, k, 1, 1)


def test_the_forced_backend_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []
    monkeypatch.setattr(selection.reference, "apply", lambda *a: ran.append("reference"))
    monkeypatch.setattr(selection.cpu, "apply", lambda *a: ran.append("cpu"))
    for name in ("reference", "cpu"):
        with backend(name):
            involution.involution2d(*call())
    assert ran == ["reference", "cpu"]


def test_environment_variables_are_checked() -> None:
    """In processes of their own: both are read once, at import and when the library is loaded."""
    code = "import involution as i; from involution.ops.backends import cpu_library, selection; i.backends(); "
    code += "print(selection.forced, cpu_library.instruction_set())"
    for name in INSTRUCTION_SETS[-2:]:
        assert run(code, INVOLUTION_BACKEND="reference", INVOLUTION_ISA=name).stdout == f"reference {name}\n"
    wrong = run(code, INVOLUTION_BACKEND="cuda")
    assert wrong.returncode != 0
    assert "INVOLUTION_BACKEND must be one of cpu, triton, reference, got 'cuda'" in wrong.stderr
    wrong = run(code, INVOLUTION_ISA="sse9")
    assert "INVOLUTION_ISA='sse9': wanted avx512, avx2 or baseline" in wrong.stderr


def test_without_kernels_the_reference_serves_and_warns_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "why_not_loaded", lambda: "libinvolution.so is not installed")
    monkeypatch.setattr(selection, "_warned", False)
    with pytest.warns(RuntimeWarning, match=r"reference path.*libinvolution.so is not installed"):
        y = involution.involution2d(*call())
    assert y.shape == (1, 4, 5, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        involution.involution2d(*call())
    records = involution.backends(*call())
    assert [(r.name, r.serves) for r in records] == [("cpu", False), ("triton", False), ("reference", True)]
    assert not records[0].available
    with backend("cpu"), pytest.raises(RuntimeError, match=r"INVOLUTION_BACKEND=cpu cannot serve.*not installed"):
        involution.involution2d(*call())


def test_forced_triton_without_a_gpu_is_interpreted() -> None:
    code = """
import torch, involution
x, k = torch.randn(1, 4, 5, 5, requires_grad=True), torch.randn(1, 2, 3, 3, 5, 5, requires_grad=True)
print([b.name for b in involution.backends(x, k, 1, 1) if b.serves])
y = involution.involution2d(x, k, 1, 1)
y.sum().backward()
from involution.ops.backends import reference, selection
selection.forced = "reference"
want = involution.involution2d(x, k, 1, 1)
torch.testing.assert_close(y, want)
torch.testing.assert_close(torch.autograd.grad(want.sum(), (x, k)), (x.grad, k.grad))
"""
    if torch.accelerator.is_available():
        pytest.skip("there is a GPU, which compiles them")
    done = run(code, INVOLUTION_BACKEND="triton")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "['triton']"


def test_a_forced_reference_does_not_warn() -> None:
    with backend("reference"), warnings.catch_warnings():
        warnings.simplefilter("error")
        involution.involution2d(*call())
