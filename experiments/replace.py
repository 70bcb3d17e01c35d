"""The replacement experiment of docs/results.md: a trained ResNet-18 whose 3x3 convolutions become involutions.

    python experiments/replace.py list                        all runs, and which are done
    python experiments/replace.py run --root DATA --commit    trains the remaining runs, about 20 minutes on one thread
    python experiments/replace.py report                      writes its table into docs/results.md

ResNet-18 at a quarter of its width is trained on 30,000 images of CIFAR-10; then `involution.rewrite.replace` swaps its
convolutions, and it is tested before any training, with recomputed norm statistics, after distillation, and after one
and three further epochs. How many epochs restore its accuracy? A run appends a line to docs/results/replace.jsonl; a
run with a line there is skipped. The trained network's weights stay in --folder.
"""

import argparse
import copy
import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch loads OpenMP: see examples/digits.py

import timm
import torch
from ledger import FOLDER, append, code_version, finished, write_tables
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader

RESULTS = FOLDER / "replace.jsonl"
WIDTHS = (16, 32, 64, 128)  # a quarter of ResNet-18's
EPOCHS, LR = 9, 0.1  # of the network with convolutions
MORE, MORE_LR = (1, 3), 0.03  # epochs after the replacement: a ninth and a third of those from scratch
IMAGES = 30_000  # of the training set, to limit the time
BATCH, MOMENTUM, WEIGHT_DECAY = 128, 0.9, 5e-4
STEPS, STEP_LR = 60, 0.01  # of the distillation: images without labels, Adam
# Which convolutions: all that fit, which leaves few layers that mix channels, or the second of every block.
REPLACED: dict[str, Callable[[str, nn.Conv2d], bool] | None] = {
    "every convolution": None,
    "the second of every block": lambda name, _: name.endswith("conv2"),
}
BEFORE = ("nothing", "statistics", "distillation")  # the steps before any training with labels
BASE = "convolutions"


class Run(NamedTuple):
    """One row: which convolutions are replaced, what is done then, and the number of epochs of training."""

    replaced: str
    before: str
    epochs: int

    @property
    def name(self) -> str:
        """The run's name in the results file."""
        return BASE if self.replaced == BASE else f"{self.replaced}/{self.before}/{self.epochs}"


def runs() -> Iterator[Run]:
    """All runs, in the order of the table."""
    yield Run(BASE, "nothing", EPOCHS)
    for replaced in REPLACED:
        for before in BEFORE:
            yield Run(replaced, before, 0)
        yield from (Run(replaced, "nothing", epochs) for epochs in MORE)
        yield Run(replaced, "distillation", MORE[0])  # does it save an epoch?


def resnet18() -> nn.Module:
    """For images of 32x32: the stem is one 3x3 convolution of stride 2, so that the first stage works at 16x16."""
    network: nn.Module = timm.create_model("resnet18", num_classes=10, channels=WIDTHS)
    network.conv1 = nn.Conv2d(3, 64, 3, stride=2, padding=1, bias=False)
    network.maxpool = nn.Identity()
    return network


class Data(NamedTuple):
    """CIFAR-10: training images, whose keys are (epoch, index), and batches of test images."""

    train: Any
    test: DataLoader[Any]


def load(root: str, images: int | None) -> Data:
    """CIFAR-10 as `involution fit` reads it; with `images`, only so many of each part, for a smoke test."""
    from involution.engine.data import SampleSeeded
    from involution.tasks.classify import CIFAR10

    data = CIFAR10(root, batch_size=BATCH, num_workers=0)
    data.setup("fit")
    data.setup("test")
    train_set = torch.utils.data.Subset(data.train_set, range(images or IMAGES))
    test_set = torch.utils.data.Subset(data.test_set, range(images or len(data.test_set)))  # type: ignore[arg-type]
    return Data(SampleSeeded(train_set, 0), DataLoader(test_set, 2 * BATCH))


def batches(data: Data, epoch: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """The training images of an epoch, shuffled and augmented."""
    order = torch.randperm(len(data.train), generator=generator).tolist()
    for start in range(0, len(order) - BATCH + 1, BATCH):
        images, labels = zip(*(data.train[epoch, index] for index in order[start : start + BATCH]), strict=True)
        yield torch.stack(images).to(memory_format=torch.channels_last), torch.tensor(labels)


def train(network: nn.Module, data: Data, epochs: int, lr: float, seed: int) -> list[float]:
    """Nesterov SGD with a short warm-up and cosine decay; every epoch's mean loss."""
    from involution.tasks.classify.module import warmup_cosine

    optimizer = torch.optim.SGD(network.parameters(), lr, MOMENTUM, weight_decay=WEIGHT_DECAY, nesterov=True)
    total = epochs * (len(data.train) // BATCH)
    factor = partial(warmup_cosine, total=total, warmup=total // 10, warmup_ratio=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    generator, losses = torch.Generator().manual_seed(seed), []
    network.train()
    for epoch in range(epochs):
        sums, count = 0.0, 0
        for images, labels in batches(data, epoch, generator):
            loss = F.cross_entropy(network(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            sums, count = sums + loss.item(), count + 1
        losses.append(sums / max(1, count))
    return losses


@torch.inference_mode()
def accuracy(network: nn.Module, data: Data) -> float:
    """The accuracy on the test images."""
    network.eval()
    hits = [(network(images).argmax(1) == labels).sum().item() for images, labels in data.test]
    return sum(hits) / len(data.test.dataset)  # type: ignore[arg-type]


def distil(network: nn.Module, teacher: nn.Module, names: list[str], images: Iterator[Tensor]) -> None:
    """Trains every new layer to reproduce the output of its convolution in the original network, for the same input.

    Inputs come from the teacher, so errors do not propagate from layer to layer. No labels are used.
    """
    students = {name: network.get_submodule(name).train() for name in names}
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(name: str, _: nn.Module, given: tuple[Tensor], output: Tensor) -> None:
        seen[name] = given[0].detach(), output.detach()

    handles = [teacher.get_submodule(name).register_forward_hook(partial(keep, name)) for name in names]
    parameters = [parameter for student in students.values() for parameter in student.parameters()]
    optimizer = torch.optim.Adam(parameters, STEP_LR)
    teacher.eval()
    for batch in images:
        with torch.no_grad():
            teacher(batch)
        errors = [F.mse_loss(students[name](x), y) / y.var() for name, (x, y) in seen.items()]
        optimizer.zero_grad()
        torch.stack(errors).sum().backward()
        optimizer.step()
    for handle in handles:
        handle.remove()


def first_images(data: Data, steps: int) -> Iterator[Tensor]:
    """Batches of training images without labels, repeated as needed."""
    generator, done = torch.Generator().manual_seed(0), 0
    while True:
        for images, _ in batches(data, 0, generator):
            if done == steps:
                return
            done += 1
            yield images


def make(run: Run, seed: int, data: Data, folder: Path) -> dict[str, Any]:
    """Trains or rewrites the network, tests it, and returns the fields of the run's line."""
    from involution.rewrite import replace

    torch.manual_seed(seed)
    started, weights = time.perf_counter(), folder / f"resnet18_seed{seed}.pt"
    network = resnet18().to(memory_format=torch.channels_last)
    losses: list[float] = []
    count = 0
    if run.replaced == BASE:
        losses = train(network, data, run.epochs, LR, seed)
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(network.state_dict(), weights)
    else:
        network.load_state_dict(torch.load(weights, weights_only=True))
        teacher = copy.deepcopy(network)
        names = replace(network, REPLACED[run.replaced]).replaced
        network.to(memory_format=torch.channels_last)
        count = len(names)
        if run.before == "distillation":
            distil(network, teacher, names, first_images(data, STEPS))
        if run.before != "nothing":
            update_bn(first_images(data, STEPS), network)
        if run.epochs:
            losses = train(network, data, run.epochs, MORE_LR, seed)
    return {
        "replaced": count,
        "test_accuracy": accuracy(network, data),
        "train_loss": losses,
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "seconds": time.perf_counter() - started,
    }


def main(arguments: list[str] | None = None) -> None:
    """Lists, runs or reports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["list", "run", "report"])
    parser.add_argument("--root", help="folder of the data, as --data.root of the recipe cifar10_rednet26")
    parser.add_argument("--folder", type=Path, default=Path("runs/replace"), help="for the trained network's weights")
    parser.add_argument("--only", default="", help="runs whose name starts with this")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--images", type=int, help="use only so many images and write no line, for a smoke test")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--commit", action="store_true", help="commit the results file after every run")
    given = parser.parse_args(arguments)
    if given.what == "report":
        write_tables(tables(finished(RESULTS)))
        return
    if given.what == "run" and given.root is None:
        parser.error("run wants --root")
    torch.set_num_threads(given.threads)
    data = load(given.root, given.images) if given.what == "run" else None
    for run in runs():
        if not run.name.startswith(given.only):
            continue
        done = any((line["name"], line["seed"]) == (run.name, given.seed) for line in finished(RESULTS))
        if data is None:
            print("done" if done else "open", f"{run.name} (seed {given.seed})")
        elif given.images or not done:
            line = {"name": run.name, "seed": given.seed, "commit": code_version(), "torch": torch.__version__}
            line |= {"threads": given.threads} | make(run, given.seed, data, given.folder)
            what = f"{run.name}, seed {given.seed}: {line['test_accuracy']:.2%}"
            if not given.images:
                append(RESULTS, line, f"Replacement: {what}" if given.commit else None)
            print(f"{what} in {line['seconds']:.0f} s", flush=True)


def tables(lines: list[dict[str, Any]]) -> dict[str, str]:
    """One row per finished run, with the mean over its seeds."""
    rows = [
        "| involutions in the place of | before training | epochs | test accuracy | against the convolutions |",
        "|---|---|---|---|---|",
    ]
    means = {}
    for run in runs():
        found = [line["test_accuracy"] for line in lines if line["name"] == run.name]
        if not found:
            continue
        means[run.name] = sum(found) / len(found)
        difference = "" if run.name == BASE or BASE not in means else f"{100 * (means[run.name] - means[BASE]):+.2f}"
        kind = "no convolution" if run.replaced == BASE else run.replaced
        rows.append(f"| {kind} | {run.before} | {run.epochs} | {means[run.name]:.2%} | {difference} |")
    return {"replace": "\n".join(rows)}


if __name__ == "__main__":
    main()
