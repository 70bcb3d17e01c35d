"""Every option of a segmenter on resume: in force, or refused with what to do."""

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
from involution.tasks.segment import Segmenter
from involution.tasks.segment.inference import Inference
from involution.tasks.segment.module import warmup_poly

CHANGED: dict[str, Any] = {
    "lr": 0.02,
    "lr_batch_size": 4,
    "momentum": 0.5,
    "weight_decay": 0.25,
    "warmup_steps": 16,
    "warmup_ratio": 0.5,
    "power": 2.0,
    "min_lr": 0.001,
    "auxiliary_weight": 0.9,
    "loss_over": "all",
    "window": [32, 40],
    "window_stride": [16, 20],
    "scales": [0.5, 1.0],
    "flip": True,
    "channels_last": False,
}
REFUSED: dict[str, tuple[str, str]] = {
    "model_name": ("upernet", "the network must be the checkpoint's, with model.model_name 'semantic_fpn', got 'up"),
    "backbone": ("resnet26_paper", "the network must be the checkpoint's, with model.backbone 'rednet26', got 'resnet"),
    "neck": ("involution", "the network must be the checkpoint's, with model.neck 'convolution', got 'involution'"),
    "backbone_kwargs": ('{"layers": [1, 1, 1, 2]}', "the network must be the checkpoint's, with model.backbone_kwargs"),
    "model_kwargs": ('{"channels": 24}', "model.model_kwargs {'channels': 16}, got {'channels': 24}; to start another"),
    "backbone_weights": ("a.pt", "backbone_weights must be None, with which the run of"),
    "init_from": ("a.pt", "init_from must be None, with which the run of"),
    "num_classes": ("5", "num_classes comes from the data, got --model.num_classes"),
}


@pytest.fixture(scope="module")
def command(make_masks: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The arguments of a run of one epoch of three steps, which has ended."""
    folder = tmp_path_factory.mktemp("resume")
    options = ["fit", "-c", "masks_rednet50", "--model.backbone", "rednet26", "--model.neck", "convolution", *QUIET]
    options += ["--trainer.default_root_dir", str(folder)]
    options += ["--model.backbone_kwargs", json.dumps(NARROW), "--model.model_kwargs", '{"channels": 16}']
    options += ["--data.root", str(make_masks(folder / "masks", train=6)), "--data.classes", '["a", "b", "c"]']
    options += ["--data.num_workers", "0", "--data.resize", "48", "--data.crop", "64", "--data.batch_size", "2"]
    options += ["--trainer.limit_val_batches", "1", "--trainer.check_val_every_n_epoch", "1"]
    run([*options, "--trainer.max_epochs", "1", "--model.lr", "0.3"])
    return [*options, "--trainer.max_epochs", "2", "--ckpt_path", str(folder / "version_0/checkpoints/last.ckpt")]


@pytest.fixture(scope="module")
def resumed(command: list[str]) -> TaskCLI:
    """The second epoch, with every other option that the model takes."""
    given = [part for name, value in CHANGED.items() for part in (f"--model.{name}", json.dumps(value).strip('"'))]
    data = ["--data.resize", "32", "--data.crop", "[32, 40]", "--data.batch_size", "3", "--data.flip", "0"]
    return run([*command, *given, *data, "--trainer.gradient_clip_val", "0.5", "--trainer.log_every_n_steps", "1"])


def test_every_option_is_tested_below() -> None:
    assert CHANGED.keys() | REFUSED.keys() == inspect.signature(Segmenter).parameters.keys()


def test_options_of_the_model_are_in_force(resumed: TaskCLI) -> None:
    model = resumed.model
    [group] = resumed.trainer.optimizers[0].param_groups
    scale = 3 / 4  # the new batch size by the new lr_batch_size
    assert (group["initial_lr"], group["momentum"], group["weight_decay"]) == (0.02 * scale, 0.5, 0.25)
    factor = warmup_poly(5, 4, round(16 / scale), 0.5, 2.0, floor=0.05)
    assert resumed.trainer.global_step == 5  # three and two; the schedule ends with the second epoch, after four
    assert group["lr"] == pytest.approx(0.02 * scale * factor)
    assert model.inference == Inference((32, 40), (16, 20), (0.5, 1.0), True)
    assert (model.hparams["loss_over"], model.hparams["auxiliary_weight"]) == ("all", 0.9)
    assert not model.net.branches[0][0][0].weight.is_contiguous(memory_format=torch.channels_last)
    assert saved_options(resumed, CHANGED) == CHANGED


def test_options_of_data_and_trainer_are_in_force(resumed: TaskCLI) -> None:
    images, _ = next(iter(resumed.datamodule.train_dataloader()))
    assert [tuple(image.shape) for image in images] == [(3, 32, 40)] * 3
    assert resumed.model.preprocessing.resize == 32
    assert (resumed.trainer.gradient_clip_val, resumed.trainer.log_every_n_steps) == (0.5, 1)


@pytest.mark.parametrize("name", REFUSED)
def test_options_that_would_need_other_weights_are_refused(name: str, command: list[str], capsys: Any) -> None:
    value, message = REFUSED[name]
    assert main([*command, f"--model.{name}", value]) == 1
    assert message in capsys.readouterr().err
