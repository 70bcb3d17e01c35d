"""The benchmark runs; its figures are for people."""

import pytest

from benchmarks import __main__ as benchmarks
from benchmarks import baselines
from benchmarks.cases import Case


def test_measure_and_report(capsys: pytest.CaptureFixture[str]) -> None:
    case = Case("small", 16, 8, 3, 2)
    operators = {"involution": benchmarks.ours, "unfold": baselines.unfold, "shifted": baselines.shifted}
    benchmarks.report(case, 1, benchmarks.measure(operators, case, 1, seconds=0.01))
    printed = capsys.readouterr().out
    assert all(name in printed for name in operators)


def test_a_wrong_operator_is_not_timed() -> None:
    with pytest.raises(AssertionError):
        benchmarks.measure(
            {"wrong": lambda x, k, s: baselines.unfold(x, k, s) * 1.01}, Case("small", 16, 8, 3, 1), 1, 0.01
        )
