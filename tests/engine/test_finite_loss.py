"""Runs whose loss is not finite stop with a diagnosis, and keep the last good checkpoint."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.plugins import MixedPrecision
from torch.utils.data import DataLoader

from involution.cli import main
from involution.engine.finite_loss import FiniteLoss
from involution.tasks.classify import Classifier

FIT = [
    *("fit", "-c", "digits_rednet", "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"),
    *("--trainer.limit_train_batches", "6", "--trainer.limit_val_batches", "1", "--trainer.max_epochs", "2"),
    *("--data.batch_size", "4", "--recovery.every_n_train_steps", "1"),
]
FOLDER = Path("runs/digits_rednet/version_0")


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def spoil(monkeypatch: pytest.MonkeyPatch, at: int, change: Any, kind: Any = Classifier) -> None:
    """Changes the loss of the batch of that number, counted over all epochs."""
    step, calls = kind.training_step, []

    def training_step(self: Any, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = step(self, batch, batch_idx)
        calls.append(batch_idx)
        return change(loss, self) if len(calls) == at + 1 else loss

    monkeypatch.setattr(kind, "training_step", training_step)


def last(folder: Path = FOLDER) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert all(one.isfinite().all() for one in content["state_dict"].values())
    return content


def test_too_large_a_learning_rate(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*FIT, "--model.lr", "1e12", "--model.warmup_steps", "0"]) == 1
    captured = capsys.readouterr()
    error = captured.err.splitlines()[-1]
    assert error.startswith("involution fit: the loss is ")
    assert f"(epoch 0, step 1): see {FOLDER / 'diagnosis.txt'}; the last good checkpoint is" in error
    assert error.endswith("version_0/checkpoints/last.ckpt (step 1)")
    report = (FOLDER / "diagnosis.txt").read_text()
    assert report.startswith("loss is ")
    assert "layer4.0.conv2" in report
    assert "exploding" in report or "non-finite in training: " in report
    assert report.splitlines()[-1] in captured.out
    assert last()["global_step"] == 1


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_the_step_is_not_made(
    value: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(monkeypatch, 8, lambda loss, _: loss * value)
    assert main(FIT) == 1
    assert f"the loss is {value} (epoch 1, step 8): see" in capsys.readouterr().err
    assert last()["global_step"] == 8
    report = (FOLDER / "diagnosis.txt").read_text()
    assert report.splitlines()[-1].startswith("note: computed again, this batch's loss is finite")  # unspoilt
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert main([*FIT, "--ckpt_path", "last"]) == 0


def test_in_the_middle_of_accumulated_batches(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(monkeypatch, 3, lambda loss, _: loss * torch.nan)
    assert main([*FIT, "--trainer.accumulate_grad_batches", "2"]) == 1
    assert "the loss is nan (epoch 0, step 1)" in capsys.readouterr().err
    assert last()["global_step"] == 1


@pytest.mark.parametrize("at", [3, 5])  # in the middle of an epoch, and with its last batch
def test_weights_that_are_not_finite_are_not_saved(
    at: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The loss is finite, but its gradient is not."""
    spoil(monkeypatch, at, lambda loss, self: loss + (self.net.fc.weight * 0).sum().sqrt())
    assert main(FIT) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"the weights are not finite, so no checkpoint is written (epoch 0, step {at + 1}): see" in error
    assert f"(step {at})" in error
    assert last()["global_step"] == at
    assert "non-finite parameters: fc.weight" in (FOLDER / "diagnosis.txt").read_text()


def test_before_the_first_checkpoint(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    spoil(monkeypatch, 0, lambda loss, _: loss * torch.nan)
    assert main(FIT) == 1
    assert "there is no checkpoint yet" in capsys.readouterr().err
    assert not list(FOLDER.rglob("*.ckpt"))


def fit(model: Any, folder: Path, **arguments: Any) -> None:
    images, labels = torch.randn(16, 3, 8, 8), torch.arange(16) % 3  # small: float16 is slow on CPUs
    loader = DataLoader(list(zip(images, labels, strict=True)), batch_size=4)  # type: ignore[arg-type]
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(
        default_root_dir=folder, accelerator="cpu", max_epochs=1, callbacks=[FiniteLoss()], **quiet, **arguments
    )
    trainer.fit(model, loader)


def test_float16_gradient_overflow_is_left_to_the_scaler(tmp_path: Path) -> None:
    """The scaler skips a step whose gradients are infinite, and training continues."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**100)  # type: ignore[attr-defined]
    precision = MixedPrecision("16-mixed", "cpu", scaler)
    model = Classifier("resnet14_cifar", 3)
    before = model.net.fc.weight.clone()
    fit(model, tmp_path, plugins=[precision])
    assert scaler.get_scale() < 2.0**100
    assert torch.equal(model.net.fc.weight, before)


def test_a_failing_diagnosis_is_reported(tmp_path: Path) -> None:
    class Plain(Classifier):
        def diagnose(self, batch: Any) -> Any:
            raise MemoryError("no memory left")

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return super().training_step(batch, batch_idx) * torch.nan

    with pytest.raises(FloatingPointError, match=r"the loss is nan \(epoch 0, step 0\)"):
        fit(Plain("resnet14_cifar", 3), tmp_path)
    assert "there is no diagnosis: MemoryError: no memory left" in (tmp_path / "diagnosis.txt").read_text()
