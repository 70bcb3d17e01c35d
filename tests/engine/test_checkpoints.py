"""Checkpoint files: atomic writes on a full disk, the newest one, and what else reads or refuses them."""

import io
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from involution.cli import main
from involution.engine.checkpoints import AtomicCheckpointIO, last_checkpoint
from involution.engine.command import run
from involution.tasks.classify import Classifier

FIT = [
    *("fit", "-c", "digits_resnet", "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"),
    *("--trainer.max_epochs", "2", "--trainer.limit_train_batches", "3", "--trainer.limit_val_batches", "1"),
    *("--data.batch_size", "4", "--recovery.every_n_train_steps", "2", "--trainer.num_sanity_val_steps", "0"),
]


def test_last_without_a_run_names_the_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"ckpt_path last: no version_.* in .*nothing"):
        last_checkpoint(tmp_path / "nothing")


def test_a_checkpoint_that_cannot_be_written_leaves_the_last_one(tmp_path: Path, monkeypatch: Any) -> None:
    file = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"step": 1}, file)

    def full(checkpoint: Any, stream: Any) -> None:
        stream.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        AtomicCheckpointIO().save_checkpoint({"step": 2}, file)
    monkeypatch.undo()
    assert torch.load(file) == {"step": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_is_an_error(tmp_path: Path, monkeypatch: Any) -> None:
    file = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"step": 1}, file)
    monkeypatch.setattr(Path, "open", lambda self, mode: io.FileIO("/dev/full", "w"))
    with pytest.raises(OSError, match="No space left on device, so the checkpoint is not written") as caught:
        AtomicCheckpointIO().save_checkpoint({"weights": torch.zeros(1 << 20)}, file)
    assert caught.value.filename == str(file)
    monkeypatch.undo()
    assert torch.load(file) == {"step": 1}


def test_a_disk_that_fills_up_ends_the_run_and_keeps_the_last_checkpoint(tmp_path: Path, monkeypatch: Any) -> None:
    """From the third step on no file may be larger than 200 kB; the run resumes from the second step's checkpoint."""
    import resource

    monkeypatch.chdir(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    step = Classifier.training_step

    def filling(self: Any, *batch: Any) -> torch.Tensor:
        if self.trainer.global_step == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
        return step(self, *batch)

    monkeypatch.setattr(Classifier, "training_step", filling)
    try:
        with pytest.raises(OSError, match=r"File too large, so the checkpoint is not written: .*\.ckpt"):
            run(FIT)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs/digits_resnet/version_0/checkpoints"
    assert [path.name for path in folder.iterdir()] == ["last.ckpt"]
    assert torch.load(folder / "last.ckpt")["global_step"] == 2
    assert run([*FIT, "--ckpt_path", "last"]).trainer.global_step == 6


def test_timm_reads_a_classifiers_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With plain timm.create_model; the weights are stored once."""
    monkeypatch.chdir(tmp_path)
    cli = run([*FIT, "--trainer.max_epochs", "1"])
    best = tmp_path / "runs/digits_resnet/version_0/checkpoints/best.ckpt"
    model = timm.create_model("resnet14_cifar", num_classes=10, checkpoint_path=str(best))
    want = cli.model.net.state_dict()
    assert all(torch.equal(one, want[name]) for name, one in model.state_dict().items())
    content = torch.load(best)
    names = {name.removeprefix("net.") for name in content["state_dict"]}
    assert set(content["state_dict_ema"]) == names
    parts = [content[name] for name in ("state_dict", "state_dict_ema")]
    assert len({one.untyped_storage().data_ptr() for part in parts for one in part.values() if one.numel()}) == sum(
        one.numel() > 0 for one in parts[0].values()
    )


def test_weights_only_checkpoints_are_checked_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Weights that the last step spoils reach no file, also where callbacks store no state."""
    monkeypatch.chdir(tmp_path)
    step = Classifier.training_step

    def spoiling(self: Any, *batch: Any) -> torch.Tensor:
        return step(self, *batch) + (self.net.fc.weight * 0).sum().sqrt()  # finite, but its gradient is not

    monkeypatch.setattr(Classifier, "training_step", spoiling)
    options = [*FIT, "--checkpoint.save_weights_only", "true", "--recovery.save_weights_only", "true"]
    assert main([*options, "--trainer.max_epochs", "1", "--recovery.every_n_train_steps", "1"]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "the weights are not finite, so no checkpoint is written (epoch 0, step 1): see" in error
    assert not list(tmp_path.rglob("*.ckpt"))
