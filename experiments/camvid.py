"""The small segmentation experiment of docs/results.md: road scenes of CamVid, involutions against convolutions.

    python experiments/camvid.py list                        all runs, and which are done
    python experiments/camvid.py run --root DATA --commit    trains the remaining runs
    python experiments/camvid.py report                      writes its tables into docs/results.md, and draws
    python experiments/camvid.py time                        times the networks interleaved, on an idle machine

A run is exactly `involution fit` with the options shown by `list`, then one evaluation on the test images with the
weights of the last epoch. It appends a line to docs/results/camvid.jsonl, and draws its predictions for four of them.
"""

import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch loads OpenMP: see examples/digits.py

import torch
from ledger import FOLDER, Experiment, curves, fit, write_tables
from matplotlib.figure import Figure
from PIL import Image

RESULTS = FOLDER / "camvid.jsonl"
SIZE = (240, 320)  # height and width of training images; test images are resized to the same height
SHOWN = (20, 90, 150, 210)  # of the test images
SHARED = [
    *("-c", "camvid_rednet26", "--data.resize", str(SIZE[0]), "--data.crop", str(list(SIZE))),
    *("--data.batch_size", "4", "--data.photometric", "false"),
    *("--model.lr", "0.04", "--model.lr_batch_size", "null", "--model.warmup_steps", "50"),
    *("--trainer.max_epochs", "13", "--trainer.check_val_every_n_epoch", "4", "--trainer.num_sanity_val_steps", "0"),
]
RUNS = {
    "RedNet-26, involution in the neck": [*SHARED, "--model.backbone", "rednet26", "--model.neck", "involution"],
    "ResNet-26, convolutions": [*SHARED, "--model.backbone", "resnet26_paper", "--model.neck", "convolution"],
}


def train(name: str, options: list[str], root: str) -> dict[str, Any]:
    """Trains, tests, draws, and returns the fields of the run's line."""
    from involution.cost import multiply_adds, parameters

    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        cli = fit(options, root, folder)
        [test] = cli.trainer.test(cli.model, cli.datamodule, verbose=False)
        losses, validation, seconds = curves(cli, "train/loss", "val/mIoU", "train/seconds")
    draw_predictions(cli, FOLDER / f"camvid_{picture_of(name)}.png")
    return {
        **{key.removeprefix("test/"): value for key, value in test.items()},
        "train_loss": losses[1],
        "val_mIoU": validation,
        "parameters": parameters(cli.model.net),
        "multiply_adds": multiply_adds(cli.model.net, (3, *SIZE)),
        "seconds_of_epochs": seconds[1],
        "seconds": time.perf_counter() - started,
    }


def picture_of(name: str) -> str:
    """The network's part of a picture's file name."""
    return name.partition(",")[0].lower().replace("-", "")


@torch.inference_mode()
def draw_predictions(cli: Any, file: Path) -> None:
    """Draws the predicted classes of some test images as colours; the licence forbids copies of the photographs."""
    from involution.tasks.segment.predictions import with_legend

    model, data = cli.model.eval(), cli.datamodule
    images = [data.test_set[index] for index in SHOWN]
    found = model.predict_step([(image, tuple(mask.shape)) for image, mask in images], 0)
    colours = torch.tensor(model.palette, dtype=torch.uint8)
    row = Image.fromarray(colours[torch.cat(found, dim=1).long()].numpy())
    row = row.resize((row.width // 2, row.height // 2), Image.Resampling.NEAREST)
    with_legend(row, range(len(model.classes)), model.classes, model.palette).save(file, optimize=True)


def tables(lines: list[dict[str, Any]]) -> dict[str, str]:
    """The tables in Markdown: one of networks, one of classes."""
    lines = [line for name in RUNS for line in lines if line["name"] == name]
    head = "| semantic FPN of | mIoU | mean accuracy | pixel accuracy | parameters | multiply-adds |"
    rows = [head, "|---|---|---|---|---|---|"]
    for line in lines:
        scores = " | ".join(f"{100 * line[what]:.1f}" for what in ("mIoU", "mean_accuracy", "pixel_accuracy"))
        cost = f"{line['parameters'] / 1e6:.2f} M | {line['multiply_adds'] / 1e9:.2f} G"
        rows.append(f"| {line['name']} | {scores} | {cost} |")
    classes = [key for key in lines[0] if key.startswith("IoU_")] if lines else []
    each = [f"| IoU of | {' | '.join(line['name'] for line in lines)} |", f"|---|{'---|' * len(lines)}"]
    for key in classes:
        each.append(f"| {key.removeprefix('IoU_')} | {' | '.join(f'{100 * line[key]:.1f}' for line in lines)} |")
    return {"camvid": "\n".join(rows), "camvid_classes": "\n".join(each)}


def report(lines: list[dict[str, Any]]) -> None:
    """Writes the tables into docs/results.md, and draws the validation mIoU over epochs."""
    write_tables(tables(lines))
    figure = Figure(figsize=(6, 3.4), dpi=110, layout="constrained")
    axes = figure.subplots()
    for line in lines:
        axes.plot(*line["val_mIoU"], "o-", label=line["name"])
    axes.set_xlabel("epoch")
    axes.set_ylabel("validation mIoU")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(FOLDER / "camvid.png")


def headline(line: dict[str, Any]) -> str:
    """A run's main result."""
    return f"mIoU {100 * line['mIoU']:.1f}"


@torch.inference_mode()
def time_table() -> str:
    """The table of times per image of 240x320 in Markdown: medians of interleaved calls."""
    from involution.bench.timer import interleaved, quartiles
    from involution.tasks.segment import SemanticFPN

    image = torch.randn(1, 3, *SIZE).to(memory_format=torch.channels_last)
    rows = ["| semantic FPN of | milliseconds an image (quartiles) |", "|---|---|"]
    networks = {
        name: SemanticFPN(options[-3], 11, neck=options[-1]).eval().to(memory_format=torch.channels_last)
        for name, options in RUNS.items()
    }
    calls = {name: lambda network=network: network(image) for name, network in networks.items()}
    for name, taken in interleaved(calls, 40).items():
        low, middle, high = quartiles(taken)
        rows.append(f"| {name} | {middle:.0f} ({low:.0f}-{high:.0f}) |")
    return "\n".join(rows)


EXPERIMENT = Experiment("CamVid", RESULTS, RUNS, train, headline, report)

if __name__ == "__main__":
    if sys.argv[1:] == ["time"]:
        write_tables({"camvid_time": time_table()})
    else:
        EXPERIMENT.main(sys.argv[1:], __doc__)
