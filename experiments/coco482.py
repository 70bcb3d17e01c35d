"""The small detection experiment of docs/results.md: persons in 482 COCO images, involutions against convolutions.

    python experiments/coco482.py list                        all runs, and which are done
    python experiments/coco482.py run --root DATA --commit    trains the remaining runs
    python experiments/coco482.py report                      writes its table into docs/results.md

A run is exactly `involution fit` with the options shown by `list`, then COCO's twelve metrics on the validation images
with the weights of the last epoch. It appends a line to docs/results/coco482.jsonl.
"""

import os
import sys
import tempfile
import time
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch loads OpenMP: see examples/digits.py

from ledger import FOLDER, Experiment, curves, fit, write_tables

RESULTS = FOLDER / "coco482.jsonl"
SIZE = (192, 288)  # pixels of the shorter side, and the maximum of the longer one
# Trained from scratch at batch size 4, which is too small for batch statistics: group norm.
SHARED = [
    *("-c", "faster_rcnn_rednet50_neck_head_fpn_1x", "--model.backbone_kwargs", '{"norm_layer": "groupnorm1"}'),
    *("--model.model_kwargs", '{"box_batch_size_per_image": 128}'),
    *("--data.categories", '["person"]', "--data.min_size", str(SIZE[0]), "--data.max_size", str(SIZE[1])),
    *("--data.batch_size", "4", "--model.lr_batch_size", "null", "--model.lr", "0.02", "--model.warmup_steps", "50"),
    *("--model.milestones", "[8]", "--trainer.max_epochs", "9", "--trainer.check_val_every_n_epoch", "9"),
    *("--trainer.num_sanity_val_steps", "0", "--trainer.log_every_n_steps", "10"),
]
INVOLUTION, CONVOLUTION = (("--model.neck", what, "--model.head", what) for what in ("involution", "convolution"))
RUNS = {
    "RedNet-26, involution in neck and head": [*SHARED, "--model.backbone", "rednet26", *INVOLUTION],
    "ResNet-26, convolutions": [*SHARED, "--model.backbone", "resnet26_paper", *CONVOLUTION],
}


def train(name: str, options: list[str], root: str) -> dict[str, Any]:
    """Trains, evaluates, and returns the fields of the run's line."""
    from involution.cost import multiply_adds, parameters
    from involution.cost.detectors import CountedRCNN

    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        cli = fit(options, root, folder)
        metrics = {key: float(value) for key, value in cli.trainer.callback_metrics.items() if key.startswith("val/")}
        (_, losses), (_, seconds) = curves(cli, "train/loss", "train/seconds")
    return {
        **{key.removeprefix("val/"): value for key, value in metrics.items()},
        "train_loss": losses,
        "parameters": parameters(cli.model.net),
        "multiply_adds": multiply_adds(CountedRCNN(cli.model.net), (3, *SIZE)),
        "seconds_of_epochs": seconds,
        "seconds": time.perf_counter() - started,
    }


def tables(lines: list[dict[str, Any]]) -> dict[str, str]:
    """The table in Markdown."""
    rows = [
        "| Faster R-CNN of | AP | AP50 | AP75 | AR100 | parameters | multiply-adds |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in RUNS:
        for line in (line for line in lines if line["name"] == name):
            scores = " | ".join(f"{100 * line[f'box_{what}']:.1f}" for what in ("AP", "AP50", "AP75", "AR100"))
            cost = f"{line['parameters'] / 1e6:.2f} M | {line['multiply_adds'] / 1e9:.2f} G"
            rows.append(f"| {name} | {scores} | {cost} |")
    return {"coco482": "\n".join(rows)}


def report(lines: list[dict[str, Any]]) -> None:
    """Writes the table into docs/results.md."""
    write_tables(tables(lines))


def headline(line: dict[str, Any]) -> str:
    """A run's main result."""
    return f"AP {100 * line['box_AP']:.1f}"


EXPERIMENT = Experiment("COCO-482", RESULTS, RUNS, train, headline, report)

if __name__ == "__main__":
    EXPERIMENT.main(sys.argv[1:], __doc__)
