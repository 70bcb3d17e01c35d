"""`--model.init_from`: training from a classifier's weights, in every task."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from involution.cli import main
from involution.engine.command import run
from involution.tasks.classify import Classifier
from involution.tasks.detect import Detector
from involution.tasks.segment import Segmenter

FIT = [
    *("fit", "-c", "digits_rednet", "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"),
    *("--trainer.limit_train_batches", "2", "--trainer.limit_val_batches", "1", "--data.batch_size", "4"),
]


@pytest.fixture
def resnet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, dict[str, torch.Tensor]]:
    """A weight file and its content."""
    monkeypatch.chdir(tmp_path)
    weights = timm.create_model("resnet14_cifar", zero_init_last=False).state_dict()
    torch.save(weights, tmp_path / "resnet14.pt")
    return tmp_path / "resnet14.pt", weights


def test_a_run_starts_from_them_and_its_checkpoint_needs_no_file(
    resnet: tuple[Path, dict[str, torch.Tensor]], capsys: pytest.CaptureFixture[str]
) -> None:
    file, weights = resnet
    options = [*FIT, "--model.init_from", str(file)]
    cli = run([*options, "--trainer.max_epochs", "1", "--model.lr", "0"])
    assert torch.equal(cli.model.net.layer1[0].conv1.weight, weights["layer1.0.conv1.weight"])
    assert torch.equal(cli.model.net.fc.weight, weights["fc.weight"])
    assert cli.model.net.layer1[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)
    last = Path("runs/digits_rednet/version_0/checkpoints/last.ckpt")
    file.unlink()
    loaded = Classifier.load_from_checkpoint(last, map_location="cpu")
    assert loaded.hparams["init_from"] == str(file)
    ours, theirs = loaded.net.state_dict(), cli.model.net.state_dict()
    assert all(torch.equal(one, theirs[name]) for name, one in ours.items())
    resumed = run([*options, "--trainer.max_epochs", "2", "--ckpt_path", "last"])
    assert resumed.trainer.global_step == 4
    with pytest.raises(ValueError, match=r"init_from must be '.*resnet14\.pt', with which .* or left out, got 'b\.pt'"):
        run([*FIT, "--model.init_from", "b.pt", "--trainer.max_epochs", "3", "--ckpt_path", "last"])
    assert main(["test", *FIT[1:7], *FIT[-2:], "--trainer.limit_test_batches", "1", "--ckpt_path", str(last)]) == 0
    capsys.readouterr()
    assert main([*options, "--trainer.max_epochs", "1"]) == 1
    assert "involution fit: init_from: source must be a file of weights or the name of" in capsys.readouterr().err


def test_a_checkpoint_replaces_them(resnet: tuple[Path, dict[str, torch.Tensor]]) -> None:
    """Also if a loaded network trains again without a ckpt_path."""
    model = Classifier("rednet14_cifar", 10, init_from="nowhere.pt")
    model.on_load_checkpoint({"involution": {"classes": model.classes, "preprocessing": None}})
    model.on_fit_start()


@pytest.mark.parametrize("name", ["semantic_fpn", "upernet", "retinanet"])
def test_backbones(name: str, tmp_path: Path) -> None:
    weights = timm.create_model("resnet26_paper", zero_init_last=False).state_dict()
    torch.save(weights, tmp_path / "resnet26.pt")
    task: Any = Detector if name == "retinanet" else Segmenter
    options = {"num_classes": 3, "backbone": "rednet26", "init_from": str(tmp_path / "resnet26.pt")}
    model = task(name, **options)
    assert not torch.equal(model.backbone.layer1[0].conv1.weight, weights["layer1.0.conv1.weight"])
    model.on_fit_start()
    assert torch.equal(model.backbone.layer1[0].conv1.weight, weights["layer1.0.conv1.weight"])
    assert all(parameter.requires_grad for parameter in model.parameters())
    with torch.no_grad():
        model.backbone.layer1[0].conv1.weight.zero_()
    model.on_fit_start()  # a second fit keeps the weights
    assert not model.backbone.layer1[0].conv1.weight.any()
    with pytest.raises(ValueError, match=r"init_from and backbone_weights exclude each other, got '.*' and 'a\.pt'"):
        task(name, **options, backbone_weights="a.pt")
