"""torch.hub on this repository as a local folder."""

from pathlib import Path
from runpy import run_path

import pytest
import timm
import torch

from involution import zoo  # noqa: F401  (registers our models with timm)

ROOT = Path(__file__).parent.parent


def test_the_networks_are_entry_points() -> None:
    entries = {name: one for name, one in run_path(str(ROOT / "hubconf.py")).items() if callable(one)}
    assert {*timm.list_models(module="rednet"), "load_checkpoint"} < set(entries)
    assert "9.23 M" in entries["rednet26"].__doc__


def test_arguments_are_timms() -> None:
    model = torch.hub.load(str(ROOT), "rednet14_cifar", source="local", num_classes=3)
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 3)


def test_pretrained_is_timms() -> None:
    with pytest.raises(RuntimeError, match="No pretrained weights exist"):
        torch.hub.load(str(ROOT), "rednetv2_26", source="local", pretrained=True)


def test_a_file_of_weights(tmp_path: Path) -> None:
    torch.save(timm.create_model("rednet14_cifar").state_dict(), tmp_path / "a.pth")
    model = torch.hub.load(str(ROOT), "load_checkpoint", str(tmp_path / "a.pth"), source="local")
    assert model.num_classes == 10
