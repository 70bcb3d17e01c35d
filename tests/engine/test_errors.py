"""The messages of runs that cannot start or end early."""

import io
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from involution.cli import main
from involution.engine.errors import one_line
from involution.engine.images import UnreadableImage
from involution.engine.trainer_options import check_trainer_options
from involution.tasks.classify import Classifier, ImageFolder

FIT = ["fit", "-c", "digits_rednet", "--trainer.enable_progress_bar", "false", "--trainer.limit_train_batches", "1"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--trainer.accelerator", "gpu"], "No supported gpu backend found!"),
        (["--trainer.max_epochs", "-3"], "`max_epochs` must be a non-negative integer or -1. You passed in -3."),
        (
            ["--model.model_name", "rednot50"],
            "model_name must be a model of timm's, got 'rednot50'; timm.list_models()",
        ),
        (["--model.mixup", "-1"], "mixup must be at least 0, got -1.0"),
        (["--data.batch_size", "0"], "batch_size must be at least 1, got 0"),
        (["--trainer.gradient_clip_val", "-1"], "trainer.gradient_clip_val must be at least 0, got -1"),
        (["--trainer.accelerator", "cpu", "--trainer.devices", "-1"], "trainer.devices: `devices` selected with `CPU"),
        (["--model.weight_decay", "-1"], "weight_decay must be at least 0, got -1.0"),
        (["--model.warmup_steps", "-1"], "warmup_steps must be at least 0, got -1"),
        (["--model.warmup_ratio", "2"], "warmup_ratio must be at most 1, got 2.0"),
        (["--model.lr_batch_size", "0"], "lr_batch_size must be at least 1, got 0"),
        (["--model.label_smoothing", "1"], "label_smoothing must be in [0, 1), got 1.0"),
        (["--model.model_kwargs", '{"in_chans": 1}'], "model_kwargs.in_chans must be 3, or left out, got 1"),
    ],
)
def test_an_option_that_does_not_fit_is_one_line(
    options: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    if "gpu" in options and torch.accelerator.is_available():
        pytest.skip("there is a GPU")
    assert main([*FIT, "--trainer.max_epochs", "1", *options]) == 1
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("involution fit: ")]
    assert line.startswith(f"involution fit: {message}")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gradient_clip_val": -1.0}, "trainer.gradient_clip_val must be at least 0, got -1.0"),
        ({"log_every_n_steps": -1}, "trainer.log_every_n_steps must be at least 0, got -1"),
        ({"min_epochs": -1}, "trainer.min_epochs must be at least 0, got -1"),
        ({"min_steps": -1}, "trainer.min_steps must be at least 0, got -1"),
        ({"min_epochs": 5, "max_epochs": 1}, "trainer.min_epochs must be at most max_epochs, which is 1, got 5"),
        ({"min_steps": 9, "max_steps": 2}, "trainer.min_steps must be at most max_steps, which is 2, got 9"),
        ({"val_check_interval": 0}, "trainer.val_check_interval must be above 0, got 0; trainer.limit_val_batches 0"),
        ({"check_val_every_n_epoch": 0}, "trainer.check_val_every_n_epoch must be at least 1, got 0"),
        ({"accumulate_grad_batches": 0}, "trainer.accumulate_grad_batches must be at least 1, got 0"),
        ({"num_sanity_val_steps": -2}, "trainer.num_sanity_val_steps must be at least -1, got -2"),
    ],
)
def test_numbers_of_the_trainer_that_make_no_sense(options: dict[str, float], message: str) -> None:
    """Lightning takes them in silence, or fails on them in the midst of a run."""
    with pytest.raises(ValueError, match=re.escape(message)):
        check_trainer_options(options)


def test_numbers_of_the_trainer_that_mean_something() -> None:
    check_trainer_options({"gradient_clip_val": 0, "log_every_n_steps": 0, "num_sanity_val_steps": -1})
    check_trainer_options({"min_epochs": 3, "max_epochs": -1, "min_steps": 3, "max_steps": None})


def test_one_value_per_channel_names_the_option() -> None:
    with pytest.raises(ValueError, match="per channel") as raised:
        torch.nn.BatchNorm2d(4)(torch.zeros(1, 4, 1, 1))
    want = "batch_size must be at least 2, or images larger: a batch norm has one value per channel in [1, 4, 1, 1]"
    assert one_line(raised.value) == want


def test_a_runtime_error_is_one_line_and_its_traceback_is_kept() -> None:
    try:
        torch.ones(2, 3) @ torch.ones(2, 3)
    except RuntimeError as error:
        line = one_line(error)
    assert line.startswith("mat1 and mat2 shapes cannot be multiplied (2x3 and 2x3) (RuntimeError; its traceback is")
    file = Path(line.rpartition(" ")[2].rstrip(")"))
    assert "test_a_runtime_error_is_one_line" in file.read_text(encoding="utf-8")
    file.unlink()


class Broken(Dataset[Any]):
    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Any:
        raise UnreadableImage("a.jpg cannot be read as an image: it is cut off")


def test_an_error_of_a_loader_worker_is_shown_as_raised() -> None:
    with pytest.raises(UnreadableImage, match="DataLoader worker") as caught:
        list(DataLoader(Broken(), num_workers=1))
    assert one_line(caught.value) == "a.jpg cannot be read as an image: it is cut off"


def test_names_that_the_terminal_cannot_encode_do_not_end_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    content = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(content, "latin-1"))
    assert main(["--help"]) == 0
    print("学习")
    sys.stdout.flush()
    assert content.getvalue().endswith(b"\\u5b66\\u4e60\n")


def test_a_locale_without_utf_8(tmp_path: Path) -> None:
    """Training and prediction with class names that the locale cannot encode."""
    for part in ("train", "val"):
        for name in ("Küche", "学习"):
            (tmp_path / part / name).mkdir(parents=True)
            for number in range(2):
                Image.new("RGB", (40, 40), (number, 0, 0)).save(tmp_path / part / name / f"{number}.png")
    both = "import sys; from involution.cli import main; [fit, predict] = map(str.split, sys.argv[1:]); "
    both += "sys.exit(main(fit) or main(predict))"
    quick = ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]
    options = ["--data.root", str(tmp_path), "--data.image_size", "32", "--data.num_workers", "0"]
    options += ["--data.batch_size", "4", "--model.model_name", "rednet14_cifar", "--trainer.max_epochs", "1"]
    environment = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C", "OMP_NUM_THREADS": "1"}
    fit = ["fit", "-c", "imagefolder_rednet50", *options, *quick]
    last = "runs/imagefolder_rednet50/version_0/checkpoints/last.ckpt"
    predict = ["predict", "--ckpt_path", last, "--data.predict_path", str(tmp_path / "val"), "--output", "out", *quick]
    command = [sys.executable, "-c", both, " ".join(fit), " ".join(predict)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "学习" in (tmp_path / "out" / "predictions.csv").read_text(encoding="utf-8")


@pytest.mark.parametrize(("images", "sizes"), [(9, [4, 4]), (10, [4, 4, 2]), (8, [4, 4])])
def test_no_batch_is_of_one_image(images: int, sizes: list[int], tmp_path: Path) -> None:
    for number in range(images):
        file = tmp_path / "train" / "ab"[number % 2] / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(file)
    data = ImageFolder(str(tmp_path), batch_size=4, num_workers=0, image_size=32)
    data.train_set = data._read("train", data._training)
    assert [len(labels) for _, labels in data.train_dataloader()] == sizes
    data.batch_size = 1
    assert len(list(data.train_dataloader())) == images


def test_loader_workers_receive_only_the_preprocessing() -> None:
    """Python 3.14 pickles the data set; a network has more tensors than a process may open files."""
    from involution.tasks.classify.preprocessing import Preprocessing

    model = Classifier("rednet14_cifar", 3)
    model.preprocessing = Preprocessing(32, 32, (0.5,) * 3, (0.5,) * 3)
    content = pickle.dumps(model.read)
    assert len(content) < 5000
    assert b"rednet" not in content
