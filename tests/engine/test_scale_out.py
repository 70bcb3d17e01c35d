"""Two processes on one machine, over gloo, compute what one process computes alone."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import metrics
from processes import Run, command, free_port, ranks

OPTIONS = [
    *("fit", "-c", "digits_resnet", "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"),
    *("--trainer.max_epochs", "2", "--trainer.limit_train_batches", "3", "--trainer.num_sanity_val_steps", "0"),
    # 143 images to validate on, which two processes cannot share evenly.
    *("--trainer.precision", "64-true", "--data.val_fraction", "0.0995"),
]
TWO = ["--trainer.devices", "2", "--trainer.strategy", "ddp", "--trainer.sync_batchnorm", "true"]


def with_torchrun(folder: Path, *arguments: str) -> None:
    """torch's launcher starts both processes."""
    port = ["--nproc-per-node", "2", "--master-port", str(free_port())]
    line = [sys.executable, "-m", "torch.distributed.run", *port, *CLI, *arguments]
    subprocess.run(line, cwd=folder, check=True, timeout=300)


def with_lightning(folder: Path, *arguments: str) -> None:
    """Lightning itself starts the second process."""
    subprocess.run([sys.executable, *CLI, *arguments], cwd=folder, check=True, timeout=300)


def with_variables(folder: Path, *arguments: str) -> None:
    """Two processes with the variables that torchrun sets."""
    for run in ranks(folder, command, *arguments):
        run.finish()


def with_slurm(folder: Path, *arguments: str) -> None:
    """Two tasks, as srun starts them."""
    job = {"SLURM_JOB_ID": "1", "SLURM_JOB_NAME": "train", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2"}
    job |= {"SLURM_NODEID": "0", "SLURM_NODELIST": "localhost", "MASTER_ADDR": "127.0.0.1"}
    job |= {"MASTER_PORT": str(free_port())}
    tasks = [{**job, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)} for rank in (0, 1)]
    for run in [Run(folder, command, *arguments, **task) for task in tasks]:
        run.finish()


CLI = ["-m", "involution.cli"]
OUT = ["--trainer.default_root_dir", "."]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    saved: dict[str, torch.Tensor] = torch.load(folder / "version_0/checkpoints/last.ckpt")["state_dict"]
    return saved


def untimed(folder: Path) -> list[dict[str, float]]:
    """A run's logged metrics without its times."""
    return [{name: row[name] for name in row if "seconds" not in name} for row in metrics(folder / "version_0")]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process, with batches of eight."""
    folder = tmp_path_factory.mktemp("alone")
    Run(folder, command, *OPTIONS, "--data.batch_size", "8", *OUT).finish()
    return folder


SLOW = [pytest.param(one, marks=pytest.mark.slow) for one in (with_torchrun, with_lightning)]  # each imports everything


@pytest.mark.parametrize("launch", [with_variables, with_slurm, *SLOW])
def test_two_processes_train_as_one_does(launch: Any, alone: Path, tmp_path: Path) -> None:
    """Two batches of four equal one of eight: gradients, norm statistics, losses and accuracies."""
    launch(tmp_path, *OPTIONS, *TWO, "--data.batch_size", "4", *OUT)
    want, got = weights(alone), weights(tmp_path)
    assert want.keys() == got.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-9, atol=1e-9, msg=lambda text, name=name: name + text)
    pairs = list(zip(untimed(tmp_path), untimed(alone), strict=True))
    assert len(pairs) == 6  # of two epochs: the learning rate, training, validation
    for ours, theirs in pairs:
        assert ours == pytest.approx(theirs, rel=1e-5)  # torchmetrics counts in float32


@pytest.mark.slow
def test_without_synchronised_norms_the_statistics_differ(alone: Path, tmp_path: Path) -> None:
    """Shows that the test above is sensitive."""
    for run in ranks(tmp_path, command, *OPTIONS, *TWO[:-1], "false", "--data.batch_size", "4", *OUT):
        run.finish()
    means = [weights(folder)["net.bn1.running_mean"] for folder in (alone, tmp_path)]
    assert not torch.allclose(*means, rtol=1e-3)


def killed(*arguments: str) -> int:
    """The command line, whose second process is killed at step 5."""
    from lightning.pytorch import Trainer

    step: Any = Trainer.global_step.fget  # type: ignore[attr-defined]

    def global_step(self: Trainer) -> int:
        if step(self) == 5 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        return int(step(self))

    Trainer.global_step = property(global_step)  # type: ignore[assignment, method-assign]
    return command(*arguments)


def test_a_run_of_two_processes_resumes_after_a_kill(tmp_path: Path) -> None:
    """One of two is killed in the second epoch, the other one ends, and last.ckpt leads to the same weights."""
    options = [*OPTIONS, *TWO, *OUT, "--trainer.deterministic", "true", "--data.batch_size", "4"]
    # Not 64-true: Lightning loads weights before it makes the network double.
    options += ["--recovery.every_n_train_steps", "2", "--trainer.precision", "32-true"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir()
    broken.mkdir()
    uninterrupted = ranks(whole, command, *options)
    for run, code in zip(ranks(broken, killed, *options), (1, -signal.SIGKILL), strict=True):
        run.finish(code)
    assert not list(broken.rglob("*.part"))
    for run in [*uninterrupted, *ranks(broken, command, *options, "--ckpt_path", "last")]:
        run.finish()
    want = weights(whole)
    got = torch.load(broken / "version_1/checkpoints/last.ckpt")["state_dict"]
    assert [name for name in want if not torch.equal(want[name], got[name])] == []


def spoilt(*arguments: str) -> int:
    """The command line, where the second process has a loss that is NaN in step 4."""
    from involution.tasks.classify import Classifier

    step = Classifier.training_step

    def training_step(self: Any, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = step(self, batch, batch_idx)
        return loss * float("nan") if self.global_step == 4 and os.environ["RANK"] == "1" else loss

    Classifier.training_step = training_step  # type: ignore[method-assign]
    return command(*arguments)


def test_a_loss_that_is_not_finite_in_one_process_stops_both(tmp_path: Path) -> None:
    """Norms share their statistics, so both processes diagnose; the one that found it reports."""
    options = [*OPTIONS, *TWO, *OUT, "--data.batch_size", "4", "--recovery.every_n_train_steps", "2"]
    outputs = [run.finish(code=1) for run in ranks(tmp_path, spoilt, *options)]
    errors = [line for text in outputs for line in text.splitlines() if "involution fit: the loss " in line]
    assert len(errors) == 2
    assert all("(epoch 1, step 4): see version_0/diagnosis_rank" in line for line in errors)
    assert all(line.endswith("the last good checkpoint is version_0/checkpoints/last.ckpt (step 4)") for line in errors)
    assert "loss in training" in (tmp_path / "version_0/diagnosis_rank1.txt").read_text()
    assert not (tmp_path / "version_0/diagnosis.txt").exists()
    assert all(one.isfinite().all() for one in weights(tmp_path).values())


def sharded() -> None:
    """Trains RedNet whole and with fully_shard, each process on half of the images, and compares the parameters."""
    import timm
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    import involution.zoo  # noqa: F401  (registers RedNet with timm)

    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.manual_seed(0)
    images, labels = torch.randn(8, 3, 32, 32).double(), torch.arange(8) % 10

    def net() -> Any:
        torch.manual_seed(1)
        return timm.create_model("rednet14_cifar", num_classes=10, norm_layer="groupnorm1").double()

    def train(model: Any, images: torch.Tensor, labels: torch.Tensor) -> None:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for _ in range(3):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()

    alone, parts = net(), net()
    train(alone, images, labels)
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
    for module in (parts.layer1, parts.layer2, parts.layer3, parts.layer4, parts):
        fully_shard(module, mesh=mesh)
    held = sum(p.to_local().numel() for p in parts.parameters())
    whole = sum(p.numel() for p in alone.parameters())
    assert held < 0.6 * whole, (held, whole)
    train(parts, images[4 * rank :][:4], labels[4 * rank :][:4])
    for (_, want), got in zip(alone.named_parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(got.full_tensor(), want, rtol=1e-9, atol=1e-9)
    print("agrees", flush=True)
    dist.destroy_process_group()


def test_sharded_parameters_train_as_whole_ones_do(tmp_path: Path) -> None:
    """FSDP (fully_shard) over RedNet; Lightning's FSDP strategy itself needs GPUs."""
    assert all("agrees" in run.finish() for run in ranks(tmp_path, sharded))
