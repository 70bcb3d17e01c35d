"""Training curves: metrics.csv files read and drawn, and the curves.png of every run."""

import csv
import time
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_info

from .checkpoints import monitored

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Curve = tuple[list[int], list[float]]
SECONDS = 60.0  # between two drawings during training


def read_curve(file: Path, metric: str) -> Curve:
    """One metric of a run: the epochs, counted from 1, and the values at them; the mean of an epoch with several.

    Raises:
        ValueError: the file has no such metric.
    """
    values: dict[int, list[float]] = {}
    with file.open(newline="") as lines:
        for row in csv.DictReader(lines):
            if row.get(metric):
                values.setdefault(int(row["epoch"]) + 1, []).append(float(row[metric]))
    if not values:
        raise ValueError(f"metric must be a column with values of {file}, got {metric!r}")
    return list(values), [sum(one) / len(one) for one in values.values()]


def draw_curves(runs: Mapping[str, Path], file: Path, title: str = "", metric: str = "accuracy") -> "Figure":
    """Draws loss (left) and a metric (right) over epochs, training dashed and validation solid, a colour per run.

    A part that a run does not log is left out. The loss axis is logarithmic and ends above the training losses: early
    in training, while the norms' running statistics lag behind, a validation loss can be thousands.

    Args:
        runs: name -> metrics.csv.
        file: the picture; its folder is created.
        title: above everything.
        metric: as it is logged after train/ and val/.

    Returns:
        The figure, already saved.

    Raises:
        ValueError: a file has no training loss.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), dpi=120, layout="constrained")
    if title:
        figure.suptitle(title)
    panels = figure.subplots(1, 2)
    for axis, what in zip(panels, ("loss", metric), strict=True):
        for colour, (name, log) in enumerate(runs.items()):
            for part, style in (("train", "--"), ("val", "-")):
                if f"{part}/{what}" != "train/loss" and not _has(log, f"{part}/{what}"):
                    continue
                epochs, values = read_curve(log, f"{part}/{what}")
                mark = "o" if len(epochs) == 1 else None
                axis.plot(epochs, values, style, marker=mark, color=f"C{colour}", label=f"{name}, {part}".lstrip(", "))
        axis.set_xlabel("epoch")
        axis.set_ylabel(what)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend()
    highest = max(value for log in runs.values() for value in read_curve(log, "train/loss")[1])
    panels[0].set_yscale("log")
    panels[0].set_ylim(top=2 * highest)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file)
    return figure


def _has(file: Path, metric: str) -> bool:
    with file.open(newline="") as lines:
        return any(row.get(metric) for row in csv.DictReader(lines))


class Curves(Callback):
    """Draws curves.png beside a run's metrics.csv: at its end, and before an epoch at most once a minute."""

    def __init__(self) -> None:
        self._drawn = time.monotonic()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Says so where there is no matplotlib."""
        if find_spec("matplotlib") is None:
            rank_zero_info("curves.png needs matplotlib, not installed here: pip install 'involution[show]'")

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draws the epochs so far."""
        if time.monotonic() - self._drawn >= SECONDS:
            self._draw(trainer)
            self._drawn = time.monotonic()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draws all epochs."""
        self._draw(trainer)

    def _draw(self, trainer: Trainer) -> None:
        """Draws the training loss and the metric that checkpoints are selected by, once there are epochs with them."""
        logs = [one for one in trainer.loggers if isinstance(one, CSVLogger)]
        if not logs or not trainer.is_global_zero or find_spec("matplotlib") is None:
            return
        logs[0].save()
        log = Path(logs[0].log_dir) / "metrics.csv"
        if not log.is_file() or not _has(log, "train/loss"):
            return
        metric = next((one.partition("/")[2] for one in monitored(trainer) if one != "val/loss"), "accuracy")
        draw_curves({"": log}, log.with_name("curves.png"), metric=metric)
