"""Training curves from the metrics.csv files of runs."""

import csv
from collections.abc import Mapping
from pathlib import Path

from matplotlib.figure import Figure

Curve = tuple[list[int], list[float]]


def read_curve(file: Path, metric: str) -> Curve:
    """One metric of a run: the epochs, counted from 1, and the values at them.

    Raises:
        ValueError: the file has no such metric.
    """
    with file.open(newline="") as lines:
        rows = [row for row in csv.DictReader(lines) if row.get(metric)]
    if not rows:
        raise ValueError(f"metric must be a column with values of {file}, got {metric!r}")
    return [int(row["epoch"]) + 1 for row in rows], [float(row[metric]) for row in rows]


def draw_curves(runs: Mapping[str, Path], file: Path, title: str = "") -> Figure:
    """Draws loss (left) and accuracy (right) over epochs, training dashed and validation solid, a colour per run.

    The loss axis is logarithmic and ends above the training losses: early in training, while the norms' running
    statistics lag behind, a validation loss can be thousands.

    Args:
        runs: name -> metrics.csv of a classification run.
        file: the picture; its folder is created.
        title: above everything.

    Returns:
        The figure, already saved.

    Raises:
        ValueError: a file lacks a metric.
    """
    figure = Figure(figsize=(10, 4), dpi=120, layout="constrained")
    if title:
        figure.suptitle(title)
    panels = figure.subplots(1, 2)
    for axis, metric in zip(panels, ("loss", "accuracy"), strict=True):
        for colour, (name, metrics) in enumerate(runs.items()):
            for part, style in (("train", "--"), ("val", "-")):
                axis.plot(*read_curve(metrics, f"{part}/{metric}"), style, color=f"C{colour}", label=f"{name}, {part}")
        axis.set_xlabel("epoch")
        axis.set_ylabel(metric)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
        axis.legend()
    highest = max(value for metrics in runs.values() for value in read_curve(metrics, "train/loss")[1])
    panels[0].set_yscale("log")
    panels[0].set_ylim(top=2 * highest)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file)
    return figure
