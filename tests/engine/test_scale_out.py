"""Two processes on one machine, over gloo: what they compute together is what one computes alone."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import metrics

OPTIONS = [
    *("fit", "-c", "digits_resnet", "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"),
    *("--trainer.max_epochs", "2", "--trainer.limit_train_batches", "3", "--trainer.num_sanity_val_steps", "0"),
    # 143 images to validate on, which two processes cannot share evenly.
    *("--trainer.precision", "64-true", "--data.val_fraction", "0.0995"),
]
TWO = ["--trainer.devices", "2", "--trainer.strategy", "ddp", "--trainer.sync_batchnorm", "true"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def start(command: list[str], folder: Path, **environment: str) -> subprocess.Popen[str]:
    everything = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen(
        command, cwd=folder, env=everything, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(processes: list[subprocess.Popen[str]], code: int = 0) -> None:
    for process in processes:
        output, _ = process.communicate(timeout=300)
        assert process.returncode == code, output


def torchrun(folder: Path, *arguments: str) -> list[subprocess.Popen[str]]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    return [start([*launcher, "--master-port", str(free_port()), *arguments], folder)]


def lightning(folder: Path, *arguments: str) -> list[subprocess.Popen[str]]:
    """Lightning itself starts the second process."""
    return [start([sys.executable, *arguments], folder)]


def slurm(folder: Path, *arguments: str) -> list[subprocess.Popen[str]]:
    """Two tasks, as srun starts them."""
    job = {"SLURM_JOB_ID": "1", "SLURM_JOB_NAME": "train", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2"}
    where = {"SLURM_NODEID": "0", "SLURM_NODELIST": "localhost", "MASTER_ADDR": "127.0.0.1"}
    port = str(free_port())
    return [
        start(
            [sys.executable, *arguments],
            folder,
            **job,
            **where,
            SLURM_PROCID=str(rank),
            SLURM_LOCALID=str(rank),
            MASTER_PORT=port,
        )
        for rank in (0, 1)
    ]


CLI = ["-m", "involution.cli"]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    saved: dict[str, torch.Tensor] = torch.load(folder / "version_0/checkpoints/last.ckpt")["state_dict"]
    return saved


def untimed(folder: Path) -> list[dict[str, float]]:
    """What a run has logged, but for its times."""
    return [{name: row[name] for name in row if "seconds" not in name} for row in metrics(folder / "version_0")]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process, with batches of eight."""
    folder = tmp_path_factory.mktemp("alone")
    single = [sys.executable, *CLI, *OPTIONS, "--data.batch_size", "8", "--trainer.default_root_dir", "."]
    finish([start(single, folder)])
    return folder


@pytest.mark.parametrize("launcher", [torchrun, slurm, pytest.param(lightning, marks=pytest.mark.slow)])
def test_two_processes_train_as_one_does(launcher: Any, alone: Path, tmp_path: Path) -> None:
    """Two batches of four are one of eight: gradients, the norms' statistics, losses and accuracies."""
    options = [*OPTIONS, *TWO, "--data.batch_size", "4", "--trainer.default_root_dir", "."]
    finish(launcher(tmp_path, *CLI, *options))
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
    """Or the test above could not tell."""
    finish(torchrun(tmp_path, *CLI, *OPTIONS, *TWO[:-1], "false", "--data.batch_size", "4", *OUT))
    means = [weights(folder)["net.bn1.running_mean"] for folder in (alone, tmp_path)]
    assert not torch.allclose(*means, rtol=1e-3)


OUT = ["--trainer.default_root_dir", "."]
KILLED = """
import os, signal, sys
from lightning.pytorch import Trainer
from involution.cli import main
step = Trainer.global_step.fget
def global_step(self):
    if step(self) == int(os.environ["KILL_AT"]) and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self)
Trainer.global_step = property(global_step)
sys.exit(main(sys.argv[1:]))
"""


def test_a_run_of_two_processes_goes_on_after_a_kill(tmp_path: Path) -> None:
    """One of two is killed in the second epoch; the rest follows it; last.ckpt leads to the same weights."""
    options = [*OPTIONS, *TWO, *OUT, "--trainer.deterministic", "true", "--data.batch_size", "4"]
    # Not 64-true: Lightning loads weights before it makes the network double.
    options += ["--recovery.every_n_train_steps", "2", "--trainer.precision", "32-true"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir()
    broken.mkdir()
    finish(torchrun(whole, *CLI, *options))
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port"]
    command = [*launcher, str(free_port()), str(script), *options]
    finish([start(command, broken, KILL_AT="5")], code=1)
    assert not list(broken.rglob("*.part"))
    finish(torchrun(broken, *CLI, *options, "--ckpt_path", "last"))
    want = weights(whole)
    got = torch.load(broken / "version_1/checkpoints/last.ckpt")["state_dict"]
    assert [name for name in want if not torch.equal(want[name], got[name])] == []


SPOILT = """
import os, sys
from involution.cli import main
from involution.tasks.classify import Classifier
step = Classifier.training_step
def training_step(self, batch, batch_idx):
    loss = step(self, batch, batch_idx)
    return loss * float("nan") if self.global_step == 4 and os.environ["RANK"] == "1" else loss
Classifier.training_step = training_step
sys.exit(main(sys.argv[1:]))
"""


def test_a_loss_that_is_not_finite_in_one_process_stops_both(tmp_path: Path) -> None:
    """Norms share their statistics, so both processes diagnose; the one that found it reports."""
    script = tmp_path / "spoilt.py"
    script.write_text(SPOILT)
    options = [*OPTIONS, *TWO, *OUT, "--data.batch_size", "4", "--recovery.every_n_train_steps", "2"]
    [process] = torchrun(tmp_path, str(script), *options)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 1
    errors = [line for line in output.splitlines() if "involution fit: the loss " in line]  # of the one that ends first
    assert any("(epoch 1, step 4): see version_0/diagnosis_rank" in line for line in errors)
    assert all(line.endswith("the last good checkpoint is version_0/checkpoints/last.ckpt (step 4)") for line in errors)
    assert "loss in training" in (tmp_path / "version_0/diagnosis_rank1.txt").read_text()
    assert not (tmp_path / "version_0/diagnosis.txt").exists()
    assert all(one.isfinite().all() for one in weights(tmp_path).values())


SHARDED = """
import timm, torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
import involution.zoo

dist.init_process_group("gloo")
rank = dist.get_rank()
torch.manual_seed(0)
images, labels = torch.randn(8, 3, 32, 32).double(), torch.arange(8) % 10

def net():
    torch.manual_seed(1)
    return timm.create_model("rednet14_cifar", num_classes=10, norm_layer="groupnorm1").double()

def step(model, images, labels):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(3):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()

alone, sharded = net(), net()
step(alone, images, labels)
mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
for stage in (sharded.layer1, sharded.layer2, sharded.layer3, sharded.layer4):
    fully_shard(stage, mesh=mesh)
fully_shard(sharded, mesh=mesh)
held = sum(p.to_local().numel() for p in sharded.parameters())
whole = sum(p.numel() for p in alone.parameters())
assert held < 0.6 * whole, (held, whole)
step(sharded, images[4 * rank :][:4], labels[4 * rank :][:4])
for (name, want), got in zip(alone.named_parameters(), sharded.parameters(), strict=True):
    torch.testing.assert_close(got.full_tensor(), want, rtol=1e-9, atol=1e-9)
print("agrees", flush=True)
dist.destroy_process_group()
"""


def test_sharded_parameters_train_as_whole_ones_do(tmp_path: Path) -> None:
    """FSDP (fully_shard) over RedNet; Lightning's FSDP strategy itself wants GPUs."""
    script = tmp_path / "sharded.py"
    script.write_text(SHARDED)
    [process] = torchrun(tmp_path, str(script))
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert output.count("agrees") == 2
