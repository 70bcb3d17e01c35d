"""Every option of a detector on resume: in force, or refused with what to do."""

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import QUIET, saved_options
from small_detectors import NARROW

from involution.cli import main
from involution.engine.command import TaskCLI, run
from involution.tasks.classify import Classifier
from involution.tasks.detect import Detector

CHANGED: dict[str, Any] = {
    "lr": 0.02,
    "lr_batch_size": 6,
    "momentum": 0.5,
    "weight_decay": 0.25,
    "warmup_steps": 0,
    "warmup_ratio": 0.5,
    "milestones": [1],
    "norm_eval": False,
    "model_kwargs": {"detections_per_img": 7},
    "channels_last": False,
}
NETWORK = "the network must be the checkpoint's, with model."
REFUSED: dict[str, tuple[str, str]] = {
    "model_name": ("faster_rcnn", f"{NETWORK}model_name 'retinanet', got 'faster_rcnn'"),
    "backbone": ("resnet26_paper", f"{NETWORK}backbone 'rednet26', got 'resnet26_paper'"),
    "neck": ("involution", f"{NETWORK}neck 'convolution', got 'involution'; to start another network from these"),
    "head": ("involution", "head must be convolution for retinanet, got 'involution'"),
    "backbone_kwargs": ('{"channels": [16, 32, 64, 96]}', f"{NETWORK}backbone_kwargs"),
    "backbone_weights": ("a.pt", "classifier.ckpt', with which the run of"),
    "init_from": ("a.pt", "init_from must be None, with which the run of"),
    "frozen_stages": ("2", "the trained parameters must be the checkpoint's"),
    "num_classes": ("5", "num_classes comes from the data, got --model.num_classes"),
}


@pytest.fixture(scope="module")
def command(make_coco: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The arguments of a run of one epoch of two steps, which has ended; its backbone is a classifier's."""
    folder = tmp_path_factory.mktemp("resume")
    narrow = {name: NARROW[name] for name in ("layers", "channels")}
    torch.save({"state_dict": Classifier("rednet26", 5, model_kwargs=narrow).state_dict()}, folder / "classifier.ckpt")
    options = ["fit", "-c", "retinanet_rednet50_fpn_1x", "--model.backbone", "rednet26", *QUIET]
    options += ["--model.backbone_kwargs", json.dumps(narrow), "--trainer.default_root_dir", str(folder)]
    options += ["--data.root", str(make_coco(folder / "coco")), "--data.num_workers", "0", "--data.batch_size", "3"]
    options += ["--data.min_size", "48", "--data.max_size", "64", "--trainer.limit_val_batches", "1"]
    options += ["--trainer.limit_train_batches", "2"]
    begin = ["--trainer.max_epochs", "1", "--model.backbone_weights", str(folder / "classifier.ckpt")]
    run([*options, *begin, "--model.lr", "0.3"])
    return [*options, "--trainer.max_epochs", "2", "--ckpt_path", str(folder / "version_0/checkpoints/last.ckpt")]


@pytest.fixture(scope="module")
def resumed(command: list[str]) -> TaskCLI:
    """The second epoch, with every other option that the model takes."""
    given = [part for name, value in CHANGED.items() for part in (f"--model.{name}", json.dumps(value))]
    data = ["--data.min_size", "40", "--data.batch_size", "2", "--data.flip", "0", "--data.group_by_shape", "false"]
    return run([*command, *given, *data, "--trainer.gradient_clip_val", "0.5", "--trainer.log_every_n_steps", "1"])


def test_every_option_is_tested_below() -> None:
    assert CHANGED.keys() | REFUSED.keys() == inspect.signature(Detector).parameters.keys()


def test_options_of_the_model_are_in_force(resumed: TaskCLI) -> None:
    model = resumed.model
    [group] = resumed.trainer.optimizers[0].param_groups
    scale = 2 / 6  # the new batch size by the new lr_batch_size
    assert (group["initial_lr"], group["momentum"], group["weight_decay"]) == (0.02 * scale, 0.5, 0.25)
    assert group["lr"] == pytest.approx(0.1 * 0.02 * scale)  # after the milestone, without warm-up
    body = model.train().net.backbone.body
    assert all(m.training for m in body.layer2.modules() if isinstance(m, torch.nn.BatchNorm2d))
    assert not any(parameter.requires_grad for parameter in body.layer1.parameters())
    assert model.net.detections_per_img == 7
    assert not model.net.backbone.fpn.layer_blocks[0][0].weight.is_contiguous(memory_format=torch.channels_last)
    assert saved_options(resumed, CHANGED) == CHANGED


def test_options_of_data_and_trainer_are_in_force(resumed: TaskCLI) -> None:
    images, _ = next(iter(resumed.datamodule.train_dataloader()))
    assert [min(image.shape[1:]) for image in images] == [40] * 2
    assert resumed.model.preprocessing.min_size == 40
    assert (resumed.trainer.gradient_clip_val, resumed.trainer.log_every_n_steps) == (0.5, 1)


@pytest.mark.parametrize("name", REFUSED)
def test_options_that_would_need_other_weights_are_refused(name: str, command: list[str], capsys: Any) -> None:
    value, message = REFUSED[name]
    assert main([*command, f"--model.{name}", value]) == 1
    assert message in capsys.readouterr().err
