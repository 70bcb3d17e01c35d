"""The CIFAR-10 experiments of docs/results.md: RedNet against its convolutional counterpart, and the paper's ablations.

    python experiments/cifar10.py list                        all runs, and which are done
    python experiments/cifar10.py run --root DATA             trains the remaining runs
    python experiments/cifar10.py run --root DATA --only ablation/group_channels --commit
    python experiments/cifar10.py report                      writes its tables into docs/results.md, and draws
    python experiments/cifar10.py time                        times training steps interleaved, on an idle machine

A run is exactly `involution fit` with the options shown by `list`, then one evaluation on the test images with the
weights of the last epoch. It appends a line to docs/results/cifar10.jsonl; a run with a line there is skipped.
"""

import argparse
import json
import os
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch loads OpenMP: see examples/digits.py

import torch
from ledger import FOLDER, append, code_version, curves, finished, fit, write_tables
from matplotlib.figure import Figure

RESULTS = FOLDER / "cifar10.jsonl"
# Twins (RedNet and its convolutional counterpart) of 14 and 26 layers: a first set with the recipe's learning rate of
# 0.1; then, because RedNet trains better with a larger one, all of it again with 0.3.
FIRST_EPOCHS, FIRST_SEEDS = 8, {14: (0, 1, 2), 26: (0, 1)}
EPOCHS, SEEDS = 6, (0, 1, 2)
BETTER = ("--model.lr", "0.3")
COMPARED_EPOCHS = 4  # of ablations, members of the family and recipes
# Half the image's resolution from the stem on: four times the images per second. So short a schedule does not start
# blocks as their shortcut.
SHARED = {"stem_stride": 2, "zero_init_last": False}
PAPER = SHARED | {"kernel_init": "paper"}  # rednet14_cifar and rednet26_cifar with the paper's initialisation
BASELINE = "lr/0.3/rednet"  # of the ablations: K = 7, 16 channels per group, reduction 4
ABLATIONS: dict[str, dict[str, dict[str, Any]]] = {
    "kernel_size": {f"K{size}": {"kernel_size": size} for size in (3, 5, 9)},
    "group_channels": {
        "1 channel a group": {"group_channels": 1},
        "4 channels a group": {"group_channels": 4},
        "all channels in one group": {"group_channels": "all"},
    },
    "reduction_ratio": {f"reduction {ratio}": {"reduction_ratio": ratio} for ratio in (1, 16)},
    "generator": {"single linear generator": {"kernel_generator": "linear"}},
    "stem": {"convolution in the stem": {"stem_layer": "convolution"}},
}
# Section 3.3: members of the family over the same windows, each replacing every involution of RedNet-14, by learning
# rate: involution's best one, and for attention two smaller ones too.
ATTENTIONS = {
    "self-attention, no positions": {"attention": "none"},
    "self-attention, bias": {"attention": "bias"},
    "self-attention, factorised positions": {"attention": "factorised"},
}
FAMILY: dict[str, dict[str, dict[str, Any]]] = {
    "0.3": {"involution": {}, "softmaxed kernels": {"kernel_generator": "softmax"}, **ATTENTIONS},
    "0.1": ATTENTIONS,
    "0.03": ATTENTIONS,
}
FAMILY_SEEDS = {"0.3": (0, 1, 2), "0.1": (0,), "0.03": (0,)}
# Generators and starts of RedNetV2, in place of its default (an L2 norm, kernels that begin as the identity).
STARTS: dict[str, dict[str, Any]] = {
    "group norm of one group": {"generator_norm_layer": "groupnorm1"},
    "layer norm over channels": {"generator_norm_layer": "layernorm2d"},
    "RMS norm over channels": {"generator_norm_layer": "rmsnorm2d"},
    "batch norm": {"generator_norm_layer": "batchnorm2d"},
    "kernels that begin as an average": {"kernel_init": "box"},
}
START_SEEDS = (0, 1)
# Other recipes for both networks: the model's options, and those of `involution fit`.
RECIPES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    **{f"lr/{lr}": ({}, ("--model.lr", str(lr))) for lr in (0.03, 0.1, 0.3, 1.0)},
    # Four times the positions, so that a 7x7 kernel is not mostly padding; three epochs, because it is slower.
    "stem_stride/1": ({"stem_stride": 1}, (*BETTER, "--trainer.max_epochs", "3")),
}


class Run(NamedTuple):
    """One training run: its row in the tables, and what is trained."""

    name: str  # table/comparison/row
    model_name: str
    model_kwargs: dict[str, Any]
    epochs: int
    seed: int
    further: tuple[str, ...] = ()

    @property
    def options(self) -> list[str]:
        """The options of `involution fit`, except --data.root."""
        recipe = "cifar10_rednet26" if self.model_name.startswith("rednet") else "cifar10_resnet26"
        return [
            *("-c", recipe, "--model.model_name", self.model_name),
            *("--model.model_kwargs", json.dumps(self.model_kwargs)),
            *("--trainer.max_epochs", str(self.epochs), "--seed_everything", str(self.seed)),
            *self.further,
        ]


def runs() -> Iterator[Run]:
    """All runs: twins by seed, so that an unfinished set is balanced; ablations; the family; other recipes."""
    kinds = {
        "rednetv2": ("rednetv2_{}_cifar", SHARED),
        "rednet": ("rednet{}_cifar", PAPER),
        "resnet": ("resnet{}_cifar", SHARED),
    }
    pairs = [(depth, family) for depth in (14, 26) for family in kinds]
    for seed in SEEDS:
        for depth, family in pairs:
            name, options = kinds[family]
            yield Run(f"twins/{depth}/{family}", name.format(depth), options, EPOCHS, seed, BETTER)
    for seed in START_SEEDS:
        for row, options in STARTS.items():
            for depth in (26, 14):
                yield Run(f"starts/{depth}/{row}", f"rednetv2_{depth}_cifar", SHARED | options, EPOCHS, seed, BETTER)
    for part, rows in ABLATIONS.items():
        for row, options in rows.items():
            yield Run(f"ablation/{part}/{row}", "rednet14_cifar", PAPER | options, COMPARED_EPOCHS, 0, BETTER)
    for seed in SEEDS:
        for lr, members in FAMILY.items():
            for row, options in members.items() if seed in FAMILY_SEEDS[lr] else ():
                name, rate = f"family/{lr}/{row}", ("--model.lr", lr)
                yield Run(name, "rednet14_cifar", PAPER | options, COMPARED_EPOCHS, seed, rate)
    for recipe, (options, further) in RECIPES.items():
        for family, start in (("rednet", PAPER), ("resnet", SHARED)):
            yield Run(f"{recipe}/{family}", f"{family}14_cifar", start | options, COMPARED_EPOCHS, 0, further)
    for depth, family in pairs:
        for seed in FIRST_SEEDS[depth]:
            name, options = kinds[family]
            yield Run(f"first/{depth}/{family}", name.format(depth), options, FIRST_EPOCHS, seed)


def is_done(run: Run, lines: list[dict[str, Any]]) -> bool:
    """Whether there is a line of this run with the same options."""
    return any((line["name"], line["seed"], line["options"]) == (run.name, run.seed, run.options) for line in lines)


def train(run: Run, root: str, threads: int, commit: str) -> dict[str, Any]:
    """Trains, tests, and returns the run's line."""
    from involution.cost import multiply_adds, parameters

    torch.set_num_threads(threads)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        cli = fit(run.options, root, folder)
        [test] = cli.trainer.test(cli.model, cli.datamodule, verbose=False)
        (_, losses), (_, accuracies), (_, seconds) = curves(cli, "train/loss", "val/accuracy", "train/seconds")
    return {
        "name": run.name,
        "seed": run.seed,
        "options": run.options,
        "test_accuracy": test["test/accuracy"],
        "test_loss": test["test/loss"],
        "val_accuracy": accuracies,
        "train_loss": losses,
        "parameters": parameters(cli.model.net),
        "multiply_adds": multiply_adds(cli.model.net, (3, 32, 32)),
        "seconds_per_epoch": statistics.median(seconds),
        "seconds": time.perf_counter() - started,
        "threads": threads,
        "torch": torch.__version__,
        "commit": commit,
    }


def main(arguments: list[str]) -> None:
    """Lists, runs or reports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["list", "run", "report", "time"])
    parser.add_argument("--root", help="folder of the data, as --data.root of the recipe cifar10_rednet26")
    parser.add_argument("--only", default="", help="runs whose name starts with this")
    parser.add_argument("--seed", type=int, help="only runs of this seed")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--commit", action="store_true", help="commit the results file after every run")
    given = parser.parse_args(arguments)
    if given.what == "report":
        report(finished(RESULTS))
        return
    if given.what == "time":
        print(time_table(given.threads))
        return
    if given.what == "run" and given.root is None:
        parser.error("run wants --root")
    commit = code_version()
    for run in runs():
        if not run.name.startswith(given.only) or given.seed not in (None, run.seed):
            continue
        done = is_done(run, finished(RESULTS))
        if given.what == "list":
            print("done" if done else "open", f"{run.name} (seed {run.seed}): involution fit", shlex.join(run.options))
        elif not done:
            line = train(run, given.root, given.threads, commit)
            what = f"{run.name}, seed {run.seed}: {line['test_accuracy']:.2%}"
            append(RESULTS, line, f"CIFAR-10: {what}" if given.commit else None)
            print(f"{what} in {line['seconds']:.0f} s", flush=True)


def report(lines: list[dict[str, Any]]) -> None:
    """Writes the tables into docs/results.md, and draws its pictures."""
    write_tables(tables(lines))
    for file in (draw_twins(lines), draw_ablations(lines)):
        print(f"wrote {file}")


def tables(lines: list[dict[str, Any]]) -> dict[str, str]:
    """The tables in Markdown, of the finished runs."""
    parts = {}
    for group in ("twins", "starts", "first", "family"):
        parts[group] = twins_table(lines, group)
    base = next((line["test_accuracy"] for line in lines if line["name"] == BASELINE), None)
    rows = [
        "| RedNet-14 with | test accuracy | against the first | parameters | multiply-adds |",
        "|---|---|---|---|---|",
    ]
    for name in [*names(lines, BASELINE), *names(lines, "ablation/")]:
        line = next(line for line in lines if line["name"] == name)
        difference = "" if base is None else f"{100 * (line['test_accuracy'] - base):+.2f}"
        rows.append(
            f"| {title(name)} | {line['test_accuracy']:.2%} | {difference} | {line['parameters']:,} "
            f"| {line['multiply_adds'] / 1e6:.2f} M |"
        )
    parts["ablations"] = "\n".join(rows)
    accuracy = {line["name"]: line["test_accuracy"] for line in lines}
    rows = ["| recipe | RedNet-14 | ResNet-14 |", "|---|---|---|"]
    for recipe in RECIPES:
        pair = [accuracy.get(f"{recipe}/{family}") for family in ("rednet", "resnet")]
        if None not in pair:
            kind, value = recipe.split("/")
            label = f"learning rate {value}" if kind == "lr" else "stem of stride 1, learning rate 0.3, 3 epochs"
            rows.append(f"| {label} | {pair[0]:.2%} | {pair[1]:.2%} |")
    parts["recipes"] = "\n".join(rows)
    return parts


def twins_table(lines: list[dict[str, Any]], group: str) -> str:
    """One row per network of a group, over all seeds."""
    head = "| network | test accuracy, mean (each seed) | largest - smallest, points | parameters | multiply-adds |"
    rows = [head, "|---|---|---|---|---|"]
    for name in names(lines, f"{group}/"):
        some = [line for line in lines if line["name"] == name]
        found = sorted(line["test_accuracy"] for line in some)
        each = ", ".join(f"{one:.2%}" for one in found)
        spread = f"{100 * (found[-1] - found[0]):.2f}" if len(found) > 1 else ""
        rows.append(
            f"| {title(name)} | {statistics.mean(found):.2%} ({each}) | {spread} | {some[0]['parameters']:,} "
            f"| {some[0]['multiply_adds'] / 1e6:.2f} M |"
        )
    return "\n".join(rows)


def time_table(threads: int) -> str:
    """The table of seconds per epoch of training steps, from medians of interleaved steps."""
    import timm

    from involution.bench.models import training_step
    from involution.bench.timer import interleaved, quartiles

    torch.set_num_threads(threads)
    images = torch.randn(128, 3, 32, 32).to(memory_format=torch.channels_last)
    twins = [f"{family}{depth}_cifar" for depth in (14, 26) for family in ("rednetv2_", "rednet", "resnet")]
    steps = {name: training_step(timm.create_model(name, **SHARED), images, compiled=False) for name in twins}
    rows = ["| network | seconds per epoch (quartiles) |", "|---|---|"]
    for name, taken in interleaved(steps, 40).items():
        low, middle, high = (45_000 / 128 * quartile / 1e3 for quartile in quartiles(taken))
        family, depth = name.removesuffix("_cifar").replace("_", "")[:-2], name.removesuffix("_cifar")[-2:]
        rows.append(f"| {title(f'twins/{depth}/{family}')} | {middle:.1f} ({low:.1f}-{high:.1f}) |")
    return "\n".join(rows)


def names(lines: list[dict[str, Any]], start: str) -> list[str]:
    """Names of finished runs with this prefix, in the order of `runs`."""
    done = {line["name"] for line in lines}
    return [name for name in dict.fromkeys(run.name for run in runs()) if name.startswith(start) and name in done]


def title(name: str) -> str:
    """A row's label."""
    if name == BASELINE:
        return "nothing changed (K7, 16 channels a group, reduction 4)"
    group, part, row = name.split("/")
    if group == "family":
        return f"{row}, learning rate {part}"
    if group == "starts":
        return f"RedNetV2-{part}, {row}"
    networks = {
        "rednetv2": "RedNetV2-{}",
        "rednet": "RedNet-{}, the paper's generator and start",
        "resnet": "ResNet-{}",
    }
    return networks[row].format(part) if row in networks else row


def draw_twins(lines: list[dict[str, Any]]) -> Path:
    """Validation accuracy over epochs, one line per seed: RedNetV2 solid, RedNet dotted, ResNet dashed."""
    figure = Figure(figsize=(9, 3.6), dpi=110, layout="constrained")
    for axes, depth in zip(figure.subplots(1, 2, sharey=True), (14, 26), strict=True):
        for colour, family, style in (("C2", "rednetv2", "-"), ("C0", "rednet", ":"), ("C1", "resnet", "--")):
            name = f"twins/{depth}/{family}"
            for index, line in enumerate(line for line in lines if line["name"] == name):
                epochs = range(1, len(line["val_accuracy"]) + 1)
                label = title(name) if index == 0 else None
                axes.plot(epochs, line["val_accuracy"], style, color=colour, alpha=0.7, label=label)
        axes.set_xlabel("epoch")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.axes[0].set_ylabel("validation accuracy")
    return save(figure, "cifar10_twins.png")


def draw_ablations(lines: list[dict[str, Any]]) -> Path:
    """A bar per ablation, and the baseline as a line."""
    ordered = [*names(lines, BASELINE), *names(lines, "ablation/")][::-1]
    some = {line["name"]: line["test_accuracy"] for line in lines if line["name"] in ordered}
    figure = Figure(figsize=(8, 4), dpi=110, layout="constrained")
    axes = figure.subplots()
    axes.barh([title(name) for name in ordered], [some[name] for name in ordered], color="C0", alpha=0.8)
    if BASELINE in some:
        axes.axvline(some[BASELINE], color="black", linestyle="--", linewidth=1)
        axes.set_xlim(left=min(some.values()) - 0.05)
    axes.set_xlabel("test accuracy after 4 epochs, one seed")
    return save(figure, "cifar10_ablations.png")


def save(figure: Figure, name: str) -> Path:
    """Writes a picture beside the results."""
    file = FOLDER / name
    figure.savefig(file)
    return file


if __name__ == "__main__":
    main(sys.argv[1:])
