"""The demo, shortened: one epoch of two batches for each network."""

import json
import runpy
from pathlib import Path

import timm

from involution.cost import parameters

DEMO = Path(__file__).parents[2] / "examples" / "digits.py"
SHORT = ["--trainer.max_epochs", "1", "--trainer.limit_train_batches", "2", "--trainer.limit_test_batches", "2"]


def test_demo_writes_summary_and_pictures(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    demo = runpy.run_path(str(DEMO))
    demo["main"](SHORT)
    folder = tmp_path / "runs" / "demo"
    summary = json.loads((folder / "summary.json").read_text())
    assert list(summary) == ["rednet", "twin"]
    for row in summary.values():
        assert list(row) == ["test_accuracy", "params", "macs", "seconds_per_epoch"]
        assert all(isinstance(value, int | float) for value in row.values())
        assert 0 <= row["test_accuracy"] <= 1
        assert row["seconds_per_epoch"] > 0
    assert summary["rednet"]["params"] == parameters(timm.create_model("rednetv2_14_cifar"))
    assert summary["twin"]["params"] == parameters(timm.create_model("resnet14_cifar"))
    for picture in ("curves.png", "kernels.png"):
        assert (folder / picture).read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert f"{summary['rednet']['params']:,}" in printed
    assert f"{summary['twin']['macs'] / 1e6:.1f} M" in printed
