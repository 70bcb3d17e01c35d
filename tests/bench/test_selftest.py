"""`involution doctor --selftest`: passes where the kernels are right, and names the first call where they are not."""

from pathlib import Path
from typing import Any

import pytest
import torch
from harness import INSTRUCTION_SETS, INTERPRETED, one_tile, use_tiles

from involution.bench import random_calls, selftest
from involution.bench.random_calls import OPERATORS, random_call
from involution.cli import main
from involution.ops.backends import cpu, triton

SHORT = ["doctor", "--selftest", "--device", "cpu", "--seconds", "0", "--network", "rednet14_cifar"]
not_interpreted = pytest.mark.skipif(INTERPRETED, reason="the CPU's own kernels are tested without TRITON_INTERPRET")


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selftest, "_LIMIT", 20_000)
    monkeypatch.setattr(selftest, "interleaved", lambda rivals, seconds: {name: [0.001] for name in rivals})
    if INTERPRETED:
        use_tiles(monkeypatch, one_tile)


@not_interpreted
def test_every_backend_passes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(SHORT) == 0
    lines = capsys.readouterr().out.splitlines()
    words = [line.split() for line in lines]
    for operator in OPERATORS:
        assert ["reference", operator, "4"] in [line[:3] for line in words]
        for name in INSTRUCTION_SETS:
            assert ["cpu", f"({name})", operator, "4"] in [line[:4] for line in words]
    assert sum(line[-1:] == ["ok"] for line in words) == 1 + len(INSTRUCTION_SETS)
    assert any(line.startswith("forward and backward") for line in lines)
    assert lines[-1] == "no backend differs from the reference"


@not_interpreted
@pytest.mark.parametrize("wrong", ["apply", "adjoint", "correlate", "fused_layer"])
def test_a_wrong_kernel_is_found_and_its_call_repeats(wrong: str, monkeypatch: Any, capsys: Any) -> None:
    """One element of a result is wrong by a thousandth of its size."""
    right = getattr(cpu, wrong)

    def spoilt(*arguments: Any) -> None:
        right(*arguments)
        out = arguments[1][0] if wrong == "fused_layer" else arguments[2]
        at = tuple(0 for _ in out.shape)
        out[at] = out[at] * 1.01 + 0.01

    monkeypatch.setattr(cpu, wrong, spoilt)
    monkeypatch.setattr(selftest, "_report_training_step", lambda *_: [])
    assert main(SHORT) == 1
    printed = capsys.readouterr().out
    assert "FAILED: " in printed
    assert "random calls" in printed
    line = printed.splitlines()[-1]
    assert line.startswith("from involution.bench.random_calls import Call; print(Call(operator=")
    exec(line, {})
    errors: dict[str, float] = eval(capsys.readouterr().out)
    assert max(errors.values()) > 1
    monkeypatch.undo()
    exec(line, {})
    assert max(eval(capsys.readouterr().out).values()) <= 1


@not_interpreted
def test_a_kernel_that_does_not_run_is_reported(monkeypatch: Any, capsys: Any) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(cpu, "correlate", broken)
    assert main(SHORT) == 1
    printed = capsys.readouterr().out
    assert "the first of them (RuntimeError: no kernel image is available), as a line of Python:" in printed
    assert "a training step of rednet14_cifar in float32 on cpu" in printed


@pytest.mark.skipif(not INTERPRETED, reason="wants TRITON_INTERPRET=1")
def test_interpreted_kernels_pass_and_wrong_ones_do_not(monkeypatch: Any) -> None:
    monkeypatch.setattr(selftest, "instruction_sets", lambda: [])
    assert ("triton", "", list(selftest._DTYPES)) in selftest.served("cpu")
    calls = [random_call(op, "triton", "", "cpu", "float32", f"interpreted/{op}", 600) for op in OPERATORS]
    for call in calls:
        error, reason = selftest.compare(call)
        assert error <= 1, (reason, call)
    adjoint = triton.adjoint

    def spoilt(grad: torch.Tensor, kernel_map: torch.Tensor, out: torch.Tensor, geometry: Any) -> None:
        adjoint(grad, kernel_map, out, geometry)
        out.add_(out.abs().max() * 1e-3)

    monkeypatch.setattr(triton, "adjoint", spoilt)
    error, reason = selftest.compare(calls[1])
    assert error > 1
    assert reason.startswith("dinput is ")


def test_random_calls_are_reproducible_and_small() -> None:
    for number in range(200):
        call = random_call(OPERATORS[number % 4], "reference", "", "cpu", "float32", str(number), 20_000)
        assert call == random_call(OPERATORS[number % 4], "reference", "", "cpu", "float32", str(number), 20_000)
        assert min(call._output()) > 0
        assert eval(repr(call), vars(random_calls)) == call


def test_wrong_arguments(capsys: Any, tmp_path: Path) -> None:
    assert main(["doctor", "--selftest", "--device", "toaster"]) == 1
    assert "--device must be one that torch finds here, got toaster" in capsys.readouterr().out
    assert main(["doctor", "--selftest", "--hours", "2"]) == 2
    assert main(["doctor", "--selftest", "--help"]) == 0
