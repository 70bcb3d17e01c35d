"""Runs that are killed resume as if they had not been interrupted, with this run's options and the best score."""

import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from command_line import metrics
from processes import Run

from involution.engine import command
from involution.engine.command import run
from involution.engine.resume import BestCheckpoint, GivenOptions
from involution.tasks.classify import Classifier

OPTIONS = [
    *("fit", "-c", "digits_resnet", "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"),
    *("--trainer.max_epochs", "2", "--trainer.limit_train_batches", "5", "--trainer.limit_val_batches", "1"),
    *("--trainer.deterministic", "true", "--data.batch_size", "4", "--recovery.every_n_train_steps", "2"),
    *("--model.model_kwargs", "{drop_rate: 0.5}", "--trainer.num_sanity_val_steps", "0"),
    *("--trainer.callbacks", "lightning.pytorch.callbacks.EMAWeightAveraging", "--trainer.callbacks.decay", "0.7"),
    *("--model.mixup", "0.3", "--model.cutmix", "1.0"),
]


def train(kill_at: int, *options: str) -> None:
    """Trains, and writes the weights at the end; kills its process at a step."""

    class States(command.RandomStates):
        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    States.__qualname__ = command.RandomStates.__qualname__  # the key of its state
    command.RandomStates = States  # type: ignore[misc]
    cli = run([*OPTIONS, *options])
    torch.save({name: value.clone() for name, value in cli.model.state_dict().items()}, "weights.pt")


def fit(folder: Path, *options: str, kill_at: int = -1) -> dict[str, torch.Tensor] | None:
    """Trains in a process of its own; the weights at the end, or None if it was killed."""
    Run(folder, train, kill_at, *options).finish(-signal.SIGKILL if kill_at >= 0 else 0)
    return None if kill_at >= 0 else torch.load(folder / "weights.pt")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """Weights after ten steps: of the moving average, whose norms have statistics of their own."""
    want = fit(tmp_path_factory.mktemp("whole"))
    assert want is not None
    return want


@pytest.mark.parametrize("workers", [0, 2])
def test_a_killed_run_resumes_bit_exactly(tmp_path: Path, workers: int, uninterrupted: dict[str, torch.Tensor]) -> None:
    """Ten steps: killed in the middle of an epoch, after a checkpoint's step, and in the next epoch."""
    loading = ["--data.num_workers", str(workers)]
    assert fit(tmp_path, *loading, kill_at=3) is None  # last.ckpt is that of step 2
    assert fit(tmp_path, *loading, "--ckpt_path", "last", kill_at=7) is None  # and of step 6, in the second epoch
    got = fit(tmp_path, *loading, "--ckpt_path", "last")
    assert got is not None
    want = uninterrupted
    assert want.keys() == got.keys()
    assert [name for name in want if not torch.equal(want[name], got[name])] == []


def test_another_order_in_the_middle_of_an_epoch_is_refused(tmp_path: Path, monkeypatch: Any) -> None:
    """Another batch size, seed or split; at the end of an epoch any batch size is accepted."""
    monkeypatch.chdir(tmp_path)
    short = [*OPTIONS, "--trainer.max_steps", "3", "--trainer.max_epochs", "-1", "--data.batch_size", "4"]
    assert run(short).trainer.global_step == 3
    with pytest.raises(ValueError, match=r"batch_size and processes must be 4 and 1, .* got 8 and 1"):
        run([*OPTIONS, "--ckpt_path", "last", "--data.batch_size", "8"])
    with pytest.raises(ValueError, match=r"seed_everything must be 0, as in the epoch .* got 3"):
        run([*OPTIONS, "--ckpt_path", "last", "--seed_everything", "3"])
    with pytest.raises(ValueError, match=r"number of training images must be 1293, .* got 718"):
        run([*OPTIONS, "--ckpt_path", "last", "--data.val_fraction", "0.5"])
    run([*OPTIONS, "--trainer.max_epochs", "1", "--trainer.default_root_dir", "whole"])  # its end is an epoch's
    there = ["--trainer.default_root_dir", "whole", "--ckpt_path", "last"]
    assert run([*OPTIONS, *there, "--data.batch_size", "8"]).trainer.global_step == 10


RESUMED = [
    *("fit", "-c", "digits_resnet", "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"),
    *("--trainer.limit_train_batches", "2", "--trainer.limit_val_batches", "1", "--data.batch_size", "4"),
    *("--trainer.log_every_n_steps", "1"),
]


def test_options_of_the_command_line_are_in_force_after_a_resume(tmp_path: Path, monkeypatch: Any, caplog: Any) -> None:
    monkeypatch.chdir(tmp_path)
    stop = ["--trainer.callbacks", "EarlyStopping", "--trainer.callbacks.monitor", "val/loss"]
    run([*RESUMED, *stop, "--trainer.callbacks.patience", "7", "--trainer.max_epochs", "1", "--model.lr", "0.3"])
    last = ["--ckpt_path", "last", "--trainer.max_epochs", "2"]
    options = ["--model.lr", "0.002", "--model.momentum", "0.5", "--model.weight_decay", "0.25"]
    cli = run([*RESUMED, *stop, "--trainer.callbacks.patience", "2", *last, *options, "--model.warmup_steps", "0"])
    groups = cli.trainer.optimizers[0].param_groups
    assert [(group["initial_lr"], group["momentum"]) for group in groups] == [(0.002, 0.5)] * 2
    assert [group["weight_decay"] for group in groups] == [0.25, 0]
    assert [one.patience for one in cli.trainer.early_stopping_callbacks] == [2]
    lines = metrics(tmp_path / "runs" / "digits_resnet" / "version_1")
    assert max(line["lr"] for line in lines if "lr" in line) <= 0.002
    saved = torch.load(tmp_path / "runs/digits_resnet/version_1/checkpoints/last.ckpt")
    assert saved["hyper_parameters"]["lr"] == saved["optimizer_states"][0]["param_groups"][0]["initial_lr"] == 0.002
    # What is not given is the checkpoint's, whatever the recipe says; and it is said.
    with caplog.at_level("INFO"):
        cli = run([*RESUMED, *stop, "--ckpt_path", "last", "--trainer.max_epochs", "3"])
    assert cli.trainer.optimizers[0].param_groups[0]["initial_lr"] == 0.002
    assert "model.lr is 0.002, as in the checkpoint, and not 0.1, as in the config; --model.lr on the" in caplog.text
    said = [line.partition(" ")[0] for line in caplog.messages if "as in the checkpoint" in line]
    assert said == [f"model.{name}" for name in ("lr", "momentum", "weight_decay", "warmup_steps")]


def scores(values: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    """The next validations log these values as val/given."""
    left = iter(values)

    def on_validation_epoch_end(self: Any) -> None:
        self.log("val/given", next(left))

    monkeypatch.setattr(Classifier, "on_validation_epoch_end", on_validation_epoch_end)


def test_the_best_score_survives_a_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], caplog: Any
) -> None:
    """A worse epoch does not become the best one, a better one does, and the earlier run's file stays."""
    monkeypatch.chdir(tmp_path)
    options = [*RESUMED, "--trainer.num_sanity_val_steps", "0", "--checkpoint.monitor", "val/given"]
    first = tmp_path / "runs/digits_resnet/version_0/checkpoints/best.ckpt"
    with monkeypatch.context() as patch:
        scores([0.5, 0.75, 0.25], patch)
        run([*options, "--trainer.max_epochs", "3"])
        scores([0.6], patch)
        cli = run([*options, "--ckpt_path", "last", "--trainer.max_epochs", "4"])
        best = cli.trainer.checkpoint_callbacks[0]
        assert (float(best.best_model_score), Path(best.best_model_path)) == (0.75, first.relative_to(tmp_path))
        assert "best val/given 0.7500: runs/digits_resnet/version_0/checkpoints/best.ckpt" in capsys.readouterr().out
        assert not list(tmp_path.glob("runs/*/version_1/checkpoints/best*"))
        scores([0.875], patch)
        cli = run([*options, "--ckpt_path", "last", "--trainer.max_epochs", "5"])
        assert float(cli.trainer.checkpoint_callbacks[0].best_model_score) == 0.875
        assert (tmp_path / "runs/digits_resnet/version_2/checkpoints/best.ckpt").is_file()
        assert torch.load(first)["epoch"] == 1
        # Moved elsewhere, the best one is found beside the last one; and where it is gone, its score is, too.
        (tmp_path / "runs/digits_resnet/version_0").rename(tmp_path / "moved")
        last = ["--ckpt_path", "moved/checkpoints/last.ckpt", "--trainer.max_epochs", "4"]
        scores([0.6], patch)
        best = run([*options, *last]).trainer.checkpoint_callbacks[0]
        assert (float(best.best_model_score), best.best_model_path) == (0.75, "moved/checkpoints/best.ckpt")
        (tmp_path / "moved/checkpoints/best.ckpt").unlink()
        scores([0.6], patch)
        with caplog.at_level("INFO"):
            best = run([*options, *last]).trainer.checkpoint_callbacks[0]
        assert float(best.best_model_score) == pytest.approx(0.6)
        assert "version_0/checkpoints/best.ckpt (val/given 0.7500)" in caplog.text
        assert "new checkpoints are not compared with these, whose files do not exist" in caplog.text


def test_every_missing_checkpoint_is_named_with_its_score(tmp_path: Path, caplog: Any) -> None:
    """Of the best three, one exists."""
    (tmp_path / "b.ckpt").touch()
    recorded = {str(tmp_path / name): torch.tensor(score) for name, score in (("a.ckpt", 0.9), ("b.ckpt", 0.8))}
    recorded[str(tmp_path / "c.ckpt")] = torch.tensor(0.7)
    callback = BestCheckpoint(dirpath=tmp_path, monitor="val/top1", mode="max", save_top_k=3)
    callback._resumed_from = tmp_path / "last.ckpt"
    state = callback.state_dict() | {"best_k_models": recorded}
    with caplog.at_level("INFO"):
        callback.load_state_dict(state)
    assert f"{tmp_path}/a.ckpt (val/top1 0.9000), {tmp_path}/c.ckpt (val/top1 0.7000)" in caplog.text
    assert callback.best_model_path == str(tmp_path / "b.ckpt")


@pytest.mark.parametrize(("mode", "best"), [("max", "a.ckpt"), ("min", "c.ckpt")])
def test_fewer_best_checkpoints_than_the_earlier_run_kept(mode: str, best: str, tmp_path: Path) -> None:
    """Three, and now one: the next is compared with the best of them, and no file is deleted."""
    recorded = {
        str(tmp_path / f"{name}.ckpt"): torch.tensor(score) for name, score in (("a", 0.9), ("b", 0.8), ("c", 0.7))
    }
    for path in recorded:
        Path(path).touch()
    callback = BestCheckpoint(dirpath=tmp_path, monitor="val/top1", mode=mode, save_top_k=1)
    callback.load_state_dict(callback.state_dict() | {"best_k_models": recorded})
    assert [Path(path).name for path in callback.best_k_models] == [best]
    assert Path(callback.best_model_path).name == Path(callback.kth_best_model_path).name == best
    better, trainer = torch.tensor(0.95 if mode == "max" else 0.6), SimpleNamespace(strategy=SimpleNamespace())
    trainer.strategy.reduce_boolean_decision = bool
    assert callback.check_monitor_top_k(trainer, better)  # type: ignore[arg-type]
    assert not callback.check_monitor_top_k(trainer, torch.tensor(0.75))  # type: ignore[arg-type]
    assert len(list(tmp_path.iterdir())) == 3


class TwoOptimizers:
    """What GivenOptions reads of a trainer: a LambdaLR for the first optimizer, OneCycleLR for the second."""

    def __init__(self, lr: float, weight_decay: float) -> None:
        parameters = [torch.nn.Parameter(torch.ones(1)) for _ in range(2)]
        self.optimizers = [torch.optim.SGD([one], lr, 0.9, weight_decay=weight_decay) for one in parameters]
        first, second = self.optimizers
        self.schedulers: list[Any] = [
            torch.optim.lr_scheduler.LambdaLR(first, lambda step: 0.5**step),
            torch.optim.lr_scheduler.OneCycleLR(second, lr, total_steps=10),
        ]
        self.lr_scheduler_configs = [SimpleNamespace(scheduler=one) for one in self.schedulers]
        self.callbacks: list[Any] = []


def test_options_are_decided_per_optimizer() -> None:
    earlier = TwoOptimizers(lr=0.4, weight_decay=0.1)
    for _ in range(3):
        for one in (*earlier.optimizers, *earlier.schedulers):
            one.step()
    resumed = TwoOptimizers(lr=0.8, weight_decay=0.2)
    callback, module = GivenOptions(), SimpleNamespace()
    callback.on_fit_start(resumed, module)  # type: ignore[arg-type]
    for kind in ("optimizers", "schedulers"):
        for new, old in zip(getattr(resumed, kind), getattr(earlier, kind), strict=True):
            new.load_state_dict(old.state_dict())
    callback.on_train_start(resumed, module)  # type: ignore[arg-type]
    first, second = (optimizer.param_groups[0] for optimizer in resumed.optimizers)
    assert (first["lr"], first["initial_lr"], first["momentum"]) == (0.8 / 8, 0.8, 0.9)
    old = earlier.optimizers[1].param_groups[0]
    assert old["momentum"] != 0.9  # OneCycleLR cycles it
    for name in ("lr", "initial_lr", "max_lr", "momentum"):
        assert second[name] == old[name], name
    assert first["weight_decay"] == second["weight_decay"] == 0.2
