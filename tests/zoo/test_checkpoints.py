"""Checkpoints of `involution fit` as weights of networks and backbones."""

from pathlib import Path

import pytest
import timm
import torch

from involution import zoo  # noqa: F401  (registers our models with timm)
from involution.tasks.classify import Classifier
from involution.zoo.checkpoints import load_backbone, load_network

NAME = "rednet14_cifar"


def saved(file: Path, prefix: str = "net.", num_classes: int = 3) -> dict[str, torch.Tensor]:
    """Writes a checkpoint of `involution fit`; returns the network's tensors."""
    weights = timm.create_model(NAME, num_classes=num_classes).state_dict()
    torch.save({"state_dict": {f"{prefix}{name}": one for name, one in weights.items()}}, file)
    return weights


@pytest.mark.parametrize(("num_classes", "left_out"), [(3, []), (5, ["fc.weight", "fc.bias"])])
def test_a_classifier_takes_anothers_weights(num_classes: int, left_out: list[str], tmp_path: Path) -> None:
    want = saved(tmp_path / "best.ckpt")
    model = Classifier(NAME, num_classes, model_kwargs={"checkpoint_path": str(tmp_path / "best.ckpt")})
    got = model.net.state_dict()
    assert all(torch.equal(got[name], one) for name, one in want.items() if name not in left_out)
    assert model.hparams["model_kwargs"] == {}
    assert load_network(model.net, tmp_path / "best.ckpt") == left_out


def test_the_error_for_another_network(tmp_path: Path) -> None:
    saved(tmp_path / "best.ckpt")
    with pytest.raises(ValueError, match=r"checkpoint_path must fit the model, got .*ckpt: missing: .*unexpected"):
        load_network(timm.create_model("resnet26"), tmp_path / "best.ckpt")


@pytest.mark.parametrize("prefix", ["net.", "net.backbone.body.", "net.pyramid.body.", "net.body."])
def test_a_backbone_takes_every_tasks_weights(prefix: str, tmp_path: Path) -> None:
    body = timm.create_model(NAME, features_only=True)
    want = {name: one + 1 for name, one in body.state_dict().items()}
    content = {f"{prefix}{name}": one for name, one in want.items()}
    other = "net.fc.weight" if prefix == "net." else "net.head.weight"
    torch.save({"state_dict": content | {other: torch.zeros(3)}}, tmp_path / "best.ckpt")
    assert load_backbone(body, tmp_path / "best.ckpt", "rednet26") == [other.removeprefix("net.")]
    assert all(torch.equal(one, want[name]) for name, one in body.state_dict().items())
