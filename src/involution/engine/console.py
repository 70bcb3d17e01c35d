"""The console output of a run: the network's size, one line per epoch, finally the best score and the next commands."""

import logging
import sys
import time
import warnings
from shlex import quote
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from .checkpoints import monitored
from .progress import OneLine

_ADVICE = (
    "Tip:",
    "TPU available",
    "Loading `train_dataloader` to estimate",
)  # Lightning's, about settings that are right here
_IRRELEVANT = (
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
    r".*does not have many workers which may be a bottleneck",  # the default is one per core
    r"The number of training batches .* is smaller than the logging interval",  # `Screen` shortens it
    r"The dirpath has changed from",  # every run has its own folder
    r"You're resuming from a checkpoint that ended before the epoch ended",  # the sampler skips batches done
)


def quiet_lightning() -> None:
    """Silences Lightning's advice, and shows each warning in one line."""
    for message in _IRRELEVANT:
        warnings.filterwarnings("ignore", message=message)
    warnings.formatwarning = _formatted
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_no_advice)


def _is_no_advice(record: logging.LogRecord) -> bool:
    return not any(part in record.getMessage() for part in _ADVICE)


def _formatted(message: Any, category: type[Warning], filename: str, lineno: int, line: str | None = None) -> str:
    where = "" if f"{__package__.partition('.')[0]}/" in filename else f" ({category.__name__}, {filename}:{lineno})"
    return f"warning: {message}{where}\n"


def on_a_terminal() -> bool:
    """Whether a progress bar can be shown."""
    return sys.stdout.isatty()


class Screen(Callback):
    """Prints the network's size and one line per epoch, but for a progress bar that prints epochs itself."""

    def __init__(self) -> None:
        self._began = time.perf_counter()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prints the number of parameters; shortens the logging interval to the batches of an epoch."""
        settings: Any = trainer
        if settings.num_training_batches < settings.log_every_n_steps:
            settings.log_every_n_steps = max(1, int(trainer.num_training_batches))
        if trainer.is_global_zero:
            everything = sum(one.numel() for one in pl_module.parameters())
            trained = sum(one.numel() for one in pl_module.parameters() if one.requires_grad)
            frozen = f", {trained / 1e6:.2f} million of them trained" if trained < everything else ""
            print(f"{everything / 1e6:.2f} million parameters{frozen}; {trainer.num_training_batches} batches an epoch")

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the clock."""
        self._began = time.perf_counter()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prints the epoch's line: losses, and the metrics that checkpoints are selected by."""
        if not isinstance(trainer.progress_bar_callback, OneLine | None) or not trainer.is_global_zero:
            return
        metrics = trainer.callback_metrics
        names = dict.fromkeys(["train/loss", "val/loss", *monitored(trainer)])
        numbers = "".join(f"  {name} {float(metrics[name]):.4f}" for name in names if name in metrics)
        of = f"/{trainer.max_epochs}" if (trainer.max_epochs or -1) > 0 else ""
        seconds = time.perf_counter() - self._began
        print(f"epoch {trainer.current_epoch + 1}{of}{numbers}  {seconds:.0f} s", flush=True)


def result_of(trainer: Trainer, recipe: str, verb: str) -> list[str]:
    """The lines printed after training: the best score, its checkpoint, and the next commands.

    Args:
        trainer: that has finished.
        recipe: the run's config.yaml.
        verb: that evaluates the checkpoint, test or validate.
    """
    best = next((one for one in trainer.checkpoint_callbacks if isinstance(one, ModelCheckpoint) and one.monitor), None)
    kept = [one for one in trainer.checkpoint_callbacks if isinstance(one, ModelCheckpoint) and one.best_model_path]
    if not kept:
        return []
    if best is not None and best.best_model_path:
        path = best.best_model_path
        score = "" if best.best_model_score is None else f" {float(best.best_model_score):.4f}"
        lines = [f"best {best.monitor}{score}: {path}"]
    else:
        path = kept[-1].best_model_path
        lines = [f"checkpoint: {path}"]
    return [
        *lines,
        f"next: involution {verb} -c {quote(recipe)} --ckpt_path {quote(path)}",
        f"      involution predict --ckpt_path {quote(path)} --data.predict_path PHOTOGRAPHS --output RESULTS",
    ]
