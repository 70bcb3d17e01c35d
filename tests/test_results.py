"""The tables of docs/results.md are those of its results files and of the code."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import involution.zoo  # noqa: F401  (registers RedNet with timm)
from involution.cost.published import cost_of
from involution.zoo.resnet import counterpart

ROOT = Path(__file__).parents[1]


def experiment(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "experiments" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    sys.path.insert(0, str(ROOT / "experiments"))  # as Python does for a script
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def cifar10() -> ModuleType:
    return experiment("cifar10")


def test_tables_are_those_of_the_results_file(cifar10: ModuleType) -> None:
    page = (ROOT / "docs" / "results.md").read_text()
    tables = cifar10.tables(cifar10.finished(cifar10.RESULTS))
    assert set(tables) == {"twins", "starts", "first", "ablations", "family", "recipes"}
    for name, table in tables.items():
        assert table.count("\n") > 2, name
        assert table in page, f"{name}: run python experiments/cifar10.py report"


@pytest.mark.parametrize(("name", "marks"), [("coco482", {"coco482"}), ("camvid", {"camvid", "camvid_classes"})])
def test_tables_of_the_dense_tasks_are_those_of_their_results_files(name: str, marks: set[str]) -> None:
    module = experiment(name)
    lines = experiment("ledger").finished(module.RESULTS)
    assert {line["name"] for line in lines} == set(module.RUNS)
    assert all(line["options"] == [*module.RUNS[line["name"]], "--seed_everything", "0"] for line in lines)
    tables = module.tables(lines)
    assert set(tables) == marks
    page = (ROOT / "docs" / "results.md").read_text()
    assert all(table in page for table in tables.values()), f"run python experiments/{name}.py report"


def test_the_table_of_replacements_is_that_of_its_results_file() -> None:
    module = experiment("replace")
    lines = module.finished(module.RESULTS)
    assert {line["name"] for line in lines} <= {run.name for run in module.runs()}
    [(name, table)] = module.tables(lines).items()
    assert name == "replace"
    assert table in (ROOT / "docs" / "results.md").read_text(), "run python experiments/replace.py report"
    made = [{"name": run.name, "test_accuracy": 0.5 + 0.01 * index} for index, run in enumerate(module.runs())]
    rows = module.tables(made)["replace"].splitlines()
    assert len(rows) == 2 + len(made)
    assert rows[2] == "| no convolution | nothing | 9 | 50.00% |  |"
    assert rows[3] == "| every convolution | nothing | 0 | 51.00% | +1.00 |"


@pytest.mark.parametrize("depth", [26, 38, 50, 101, 152])
def test_costs_of_rednetv2_are_the_pages(depth: int) -> None:
    name = f"rednetv2_{depth}"
    other = counterpart(name)
    assert other is not None
    with torch.device("meta"):  # counting needs no weights
        ours, theirs = cost_of(name)[0], cost_of(other)[0]
    saved = [1 - ours.parameters / theirs.parameters, 1 - ours.multiply_adds / theirs.multiply_adds]
    figures = f"{ours.parameters:,} | {ours.multiply_adds / 1e9:.3f} G | {ours.total / 1e9:.3f} G"
    row = f"| `{name}` | {figures} | `{other}` | {saved[0]:.1%}, {saved[1]:.1%} |".replace("%", " %")
    assert row in (ROOT / "docs" / "results.md").read_text(), row


def test_every_run_is_in_the_set_and_recorded_once(cifar10: ModuleType) -> None:
    lines = cifar10.finished(cifar10.RESULTS)
    keys = [(line["name"], line["seed"]) for line in lines]
    assert len(keys) == len(set(keys))
    runs = {(run.name, run.seed): run for run in cifar10.runs()}
    assert all(cifar10.is_done(runs[key], lines) for key in keys)


def test_a_finished_run_is_skipped_and_a_new_one_is_appended(
    cifar10: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []

    def train(run, root, threads, commit):  # type: ignore[no-untyped-def]
        made.append(run)
        line = {"name": run.name, "seed": run.seed, "options": run.options, "test_accuracy": 0.123456, "seconds": 1.0}
        return line

    monkeypatch.setattr(cifar10, "RESULTS", tmp_path / "cifar10.jsonl")
    monkeypatch.setattr(cifar10, "train", train)
    for _ in range(2):
        cifar10.main(["run", "--root", "anywhere", "--only", "ablation/kernel_size"])
    assert [run.name for run in made] == [f"ablation/kernel_size/K{size}" for size in (3, 5, 9)]
    lines = [json.loads(line) for line in (tmp_path / "cifar10.jsonl").read_text().splitlines()]
    assert [line["test_accuracy"] for line in lines] == [0.1235] * 3
