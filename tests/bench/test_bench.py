"""Every benchmark runs at its smallest size and is reported; its figures are not checked."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from involution import cli, involution3d
from involution.bench import baselines, command, family, kernels, loading, memory, models, paper, registry, report
from involution.bench.cases import CASES, NECK, Case
from involution.bench.roofline import Roofline
from involution.nn import LocalSelfAttention2d

SMALL = [Case("small", 16, 8, 8, 3, 1), Case("strided", 32, 8, 7, 3, 2)]


def floats(rows: list[dict]) -> list[float]:
    return [value for row in rows for value in row.values() if isinstance(value, float)]


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[dict]]:
    """Every subject but detection at its smallest. Compilation is tested elsewhere; here it is left out."""
    monkeypatch.setattr(torch, "compile", lambda f, **_: f)
    monkeypatch.setattr(loading, "PHOTOGRAPHS", 2)
    some = ("inference", "training")  # each is a process
    monkeypatch.setattr(memory, "MEMORY_CASES", {what: memory.MEMORY_CASES[what] for what in some})
    monkeypatch.setattr(memory, "VOLUME_CASES", {"volume": memory.VOLUME_CASES["volume"]})
    monkeypatch.setattr(models, "optimize", lambda model, image: model)
    names = ("rednet14_cifar", "resnet14_cifar")
    pairs, roofline = command.workloads(SMALL, [1, 2]), Roofline(1e11, 1e10)
    once, twice = pairs[: len(SMALL)], pairs[len(SMALL) :]
    return {
        "layers": kernels.layers(pairs, 0.0, roofline),
        "against": kernels.against(twice, 0.0),
        "fused": kernels.fused(once, 0.0, roofline),
        "models": models.models([1], 0.0, names, 32),
        "training": models.training([2], 0.0, names, 32),
        "memory": memory.memory(Case("tiny", 16, 16, 16, 7, 1), 8),
        "threads": kernels.threads(once, 0.0),
        "overhead": kernels.overhead(0.0),
        "paper": paper.paper(twice),
        "loading": loading.loading(0.0, 2, ["rednet14_cifar"]),
        "family": family.family(twice, 0.0),
    }


@pytest.mark.slow
def test_detection_is_measured() -> None:
    rows = memory.detection(96, 128)
    assert [row["what"] for row in rows] == ["involution", "unfold in the place of every involution"]
    assert all(math.isfinite(row["MiB"]) for row in rows)


def test_unfold_of_a_volume_is_the_operator() -> None:
    x, k = torch.randn(2, 6, 4, 5, 3, dtype=torch.float64), torch.randn(2, 2, 3, 3, 3, 4, 5, 3, dtype=torch.float64)
    torch.testing.assert_close(baselines.unfold3d(x, k), involution3d(x, k, padding="same"))


def test_every_subject_is_measured_printed_written_and_drawn(
    rows: dict[str, list[dict]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert set(rows) == set(registry.SUBJECTS) - {"detection"}
    for subject, some in rows.items():
        assert some, subject
        assert all(math.isfinite(value) for value in floats(some)), subject
        if subject != "memory":  # so small a layer may fit into memory that the process has
            assert all(value > 0 for value in floats(some)), subject
    assert len(rows["layers"]) == 3 * len(SMALL) * 2
    assert len(rows["threads"]) == 4 * len(SMALL)
    low, middle, high = rows["against"][0]["quartiles, ms"]["unfold"]
    assert 0 < low <= middle <= high
    files = report.write(rows, command.describe(Roofline(1e11, 1e10)), tmp_path)
    assert {file.name for file in files} == {"bench.json", "roofline.png", "models.png", "memory.png"}
    assert all(file.stat().st_size > 1000 for file in files)
    written = json.loads((tmp_path / "bench.json").read_text())
    assert written["results"]["layers"][0]["case"] == "small"
    assert {row["what"] for row in written["geometric means"]["layers"]} == {"apply", "adjoint", "correlate"}
    report.print_tables({name: rows[name] for name in ("layers", "against", "training")})
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("correlate", "unfold", "depthwise", "geometric mean", "rednet14_cifar"))


def test_geometric_mean() -> None:
    rows = [
        {"what": "apply", "case": name, "batch": 1, "roofline": fraction}
        for name, fraction in (("a", 0.5), ("b", 0.125))
    ]
    assert report.geometric_means(rows) == [{"what": "apply", "case": "geometric mean", "batch": 1, "roofline": 0.25}]


def test_means_leave_out_columns_that_a_row_lacks() -> None:
    rows = [{"what": "apply", "case": case, "batch": 1, "roofline": 0.5} for case in "ab"]
    rows[0]["issue, us"] = 3.0  # known for some GPUs only
    assert report.geometric_means(rows) == [{"what": "apply", "case": "geometric mean", "batch": 1, "roofline": 0.5}]


def test_torchs_flex_attention_is_local_self_attention() -> None:
    """The rival computes what our layer does, border included."""
    local = LocalSelfAttention2d(32, 5, stride=2, heads=2)
    x = torch.randn(2, 32, 9, 8)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        torch.testing.assert_close(family.FlexNeighbourhood(local)(x), local(x), rtol=1e-4, atol=1e-5)


def test_an_operator_with_wrong_results_is_not_timed() -> None:
    rivals = {"ours": kernels._ours, "wrong": lambda x, k, s: baselines.unfold(x, k, s) * 1.01}
    with pytest.raises(AssertionError):
        kernels.compare(rivals, SMALL[0], 1, 0.0)


def test_flops_and_bytes_are_those_of_the_tensors() -> None:
    for case in (*CASES.values(), NECK):
        x, k, g = (tensor.to("meta") for tensor in case._replace(channels=16).tensors(1))
        small = case._replace(channels=16)
        assert small.bytes(3) == 3 * 4 * (x.numel() + k.numel() + g.numel())
        assert small.flops(2) == 2 * 2 * case.kernel_size**2 * g.numel()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["nonsense"], "what"),
        (["--case", "C1@1"], "--case"),
        (["--batch", "0"], "--batch"),
        (["--device", "tpu"], "--device"),
    ],
)
def test_a_wrong_call_names_the_option(arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", *arguments]) == 2
    assert named in capsys.readouterr().err


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "measure_roofline", lambda: Roofline(1e11, 1e10))
    monkeypatch.setitem(CASES, "small", SMALL[0])
    call = ["bench", "layers", "overhead", "--case", "small", "--batch", "1", "--seconds", "0", "--out", str(tmp_path)]
    assert cli.main(call) == 0
    assert "correlate" in capsys.readouterr().out
    machine = json.loads((tmp_path / "bench.json").read_text())["machine"]
    assert machine["command"].startswith("involution bench layers overhead --case small")


def test_all_is_every_registered_subject_with_the_settings_that_it_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: dict[str, dict[str, Any]] = {}
    for name, subject in list(registry.SUBJECTS.items()):
        recorder = subject._replace(function=lambda name=name, **settings: ran.update({name: settings}) or [])
        monkeypatch.setitem(registry.SUBJECTS, name, recorder)
    monkeypatch.setattr(command, "measure_roofline", lambda: Roofline(1e11, 1e10))
    assert command.main(["layers", "all", "--batch", "3", "--device", "cpu", "--out", str(tmp_path)]) == 0
    assert list(ran) == list(registry.SUBJECTS)
    assert all(set(settings) == set(registry.SUBJECTS[name].options) for name, settings in ran.items())
    assert ran["models"]["batches"] == [3]
    assert ran["layers"]["workloads"] == [(CASES["C64@56"], 3)]


def test_the_neck_is_measured_at_batch_size_one_only() -> None:
    assert command.workloads([SMALL[0], NECK], [2, 4]) == [(SMALL[0], 2), (SMALL[0], 4), (NECK, 1)]
    assert command.workloads([NECK], [2]) == [(NECK, 1)]


def test_a_registered_subject_is_listed_run_and_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "measure_roofline", lambda: Roofline(1e11, 1e10))

    @registry.subject("counting", ("seconds",))
    def counting(seconds: float) -> list[dict[str, Any]]:
        """Counts to three."""
        return [{"what": "counting", "case": "three", "batch": 1, "counted": 3.0}]

    try:
        with pytest.raises(SystemExit):
            cli.main(["bench", "--help"])
        assert "counting   Counts to three. [--seconds]" in capsys.readouterr().out
        assert cli.main(["bench", "counting", "--out", str(tmp_path)]) == 0
        assert "3.00" in capsys.readouterr().out
        assert json.loads((tmp_path / "bench.json").read_text())["results"]["counting"][0]["counted"] == 3.0
        with pytest.raises(ValueError, match="name must be a new one, got 'counting'"):
            registry.subject("counting")
        with pytest.raises(ValueError, match=r"options must be of workloads, .*, got colour"):
            registry.subject("coloured", ("colour",))
    finally:
        del registry.SUBJECTS["counting"]


def test_a_subject_whose_extra_is_missing_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "find_spec", lambda name: None if name == "lightning" else object())
    assert cli.main(["bench", "overhead", "loading"]) == 1
    error = capsys.readouterr().err
    assert error == "involution bench loading needs lightning, not installed here: pip install 'involution[tasks]'\n"
