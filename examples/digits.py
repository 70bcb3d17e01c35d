"""The demo: trains a small RedNet and its convolutional counterpart on scikit-learn's digits, and compares them.

    python examples/digits.py          (or `make demo`; about two minutes on two cores)

Writes under runs/demo/: summary.json, curves.png, kernels.png, and a folder per network. Arguments go to
`involution fit`, e.g. --trainer.max_epochs 2 or --seed_everything 1.
"""

import json
import os
import statistics
import sys
import time
from pathlib import Path

# Set before torch loads OpenMP, so that waiting threads sleep. If another process uses one of the cores, spinning makes
# networks this small ten times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from rich.console import Console
from rich.table import Table

from involution.cost import multiply_adds, parameters
from involution.engine.command import TaskCLI, run
from involution.engine.curves import draw_curves, read_curve
from involution.show import catch_kernel_maps, draw_kernels, kernel_heat

FOLDER = Path("runs/demo")
RECIPES = {"rednet": "digits_rednet", "twin": "digits_resnet"}
NAMES = {"rednet": "RedNet (involution)", "twin": "ResNet (convolution)"}
LAYERS = {"stem.conv2": "stem", "layer1.0.conv2": "stage 1", "layer2.0.conv2": "stage 2", "layer3.0.conv2": "stage 3"}


def train(network: str, arguments: list[str]) -> TaskCLI:
    """Exactly `involution fit -c RECIPE --trainer.default_root_dir runs/demo/NETWORK`."""
    return run(["fit", "-c", RECIPES[network], "--trainer.default_root_dir", str(FOLDER / network), *arguments])


def metrics_file(trained: TaskCLI) -> Path:
    """The CSV log of a run."""
    return Path(str(trained.trainer.log_dir)) / "metrics.csv"


def evaluate(trained: TaskCLI) -> dict[str, float]:
    """One network's row, with the weights of its last epoch; the only use of the test images."""
    [result] = trained.trainer.test(trained.model, trained.datamodule, verbose=False)
    _, seconds = read_curve(metrics_file(trained), "train/seconds")
    return {
        "test_accuracy": result["test/accuracy"],
        "params": parameters(trained.model.net),
        "macs": multiply_adds(trained.model.net, (3, 32, 32)),
        "seconds_per_epoch": statistics.median(seconds),
    }


def table(summary: dict[str, dict[str, float]]) -> Table:
    """The summary as a table."""
    shown = Table("network", title="Handwritten digits, 32x32, 360 held-out images")
    for column in ("test accuracy", "parameters", "multiply-adds", "seconds per epoch"):
        shown.add_column(column, justify="right")
    for network, row in summary.items():
        shown.add_row(
            NAMES[network],
            f"{row['test_accuracy']:.2%}",
            f"{row['params']:,}",
            f"{row['macs'] / 1e6:.1f} M",
            f"{row['seconds_per_epoch']:.1f}",
        )
    return shown


def picture(trained: TaskCLI, file: Path) -> None:
    """Draws the sums of the trained RedNet's kernels, for one test image of every digit."""
    test_set = trained.datamodule.test_set
    chosen = [int((test_set.labels == digit).nonzero()[0, 0]) for digit in range(10)]
    batch = torch.stack([test_set[index][0] for index in chosen])
    maps = catch_kernel_maps(trained.model.net, batch.to(trained.model.device), list(LAYERS))
    heats = {LAYERS[name]: kernel_heat(kernels) for name, kernels in maps.items()}
    draw_kernels(test_set.images[chosen], heats, file, title="The sum of the kernel at every position")


def main(arguments: list[str]) -> None:
    """Trains, evaluates, prints and draws."""
    started = time.perf_counter()
    trained = {network: train(network, arguments) for network in RECIPES}
    summary = {network: evaluate(cli) for network, cli in trained.items()}
    (FOLDER / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    logs = {NAMES[network]: metrics_file(cli) for network, cli in trained.items()}
    draw_curves(logs, FOLDER / "curves.png", title="Handwritten digits (the training loss includes label smoothing)")
    picture(trained["rednet"], FOLDER / "kernels.png")
    console = Console()
    console.print(table(summary))
    console.print(f"{time.perf_counter() - started:.0f} s in all; pictures and summary.json are in {FOLDER}/")


if __name__ == "__main__":
    main(sys.argv[1:])
