"""The progress of a run on a terminal: one line with loss, metric, images per second and the time left."""

import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.trainer.states import TrainerFn
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from .checkpoints import monitored

REFRESH = 0.5  # seconds between two reads of the loss, which wait for a GPU


class OneLine(ProgressBar):
    """One line for all epochs of a run, validation included.

    It shows the epoch, a bar over all training batches, the last batch's loss, the metric that checkpoints are selected
    by, images per second of training and the time left, from the time so far, validation included.

    Args:
        console: where it is drawn; None takes the terminal's.
    """

    def __init__(self, console: Console | None = None) -> None:
        super().__init__()
        self._console, self._enabled = console, True
        self._bar: Progress | None = None
        self._began = self._training = self._read = 0.0
        self._first = self._images = 0

    def disable(self) -> None:
        """Shows nothing from now on; Lightning calls it in all processes but the first."""
        self._enabled = False

    def enable(self) -> None:
        """Shows the line again."""
        self._enabled = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the line, at the batch from which a run resumes."""
        self._start(_batches(trainer))
        self._first = _done(trainer)
        self._images, self._training = 0, 0.0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Starts the batch's clock."""
        self._step = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Moves the bar; twice a second also the numbers."""
        now = time.perf_counter()
        self._training += now - self._step
        self._images += len(batch[0]) * trainer.world_size
        if self._bar is None or now - self._read < REFRESH:
            return
        self._read = now
        done = _done(trainer)
        total = _batches(trainer)
        left = "" if total is None else f"{_clock((now - self._began) / (done - self._first) * (total - done))} left"
        speed = f"{self._images / self._training:.0f} images/s"
        epochs = f"/{trainer.max_epochs}" if (trainer.max_epochs or -1) > 0 else ""
        loss = f"loss {float(outputs['loss']):.4g}"
        text = "  ".join([loss, *_metrics(trainer), speed, left])
        self._update(f"epoch {trainer.current_epoch + 1}{epochs}", text, done)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Removes the line."""
        self._stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Removes the line."""
        self._stop()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts a line of its own if there is none: outside of training."""
        if self._bar is None:
            self._start(_total(trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches))

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Shows the batch of the validation; outside of training the bar is the validation's."""
        self._evaluated("validation", batch_idx + 1, _total(trainer.num_val_batches), _trains(trainer))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Removes a line of its own."""
        if not _trains(trainer):
            self._stop()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the line."""
        self._start(_total(trainer.num_test_batches))

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Moves the bar."""
        self._evaluated("test", batch_idx + 1, _total(trainer.num_test_batches), False)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Removes the line."""
        self._stop()

    def _evaluated(self, what: str, done: int, total: int | None, training: bool) -> None:
        of = "" if total is None else f"/{total}"
        self._update(f"{what} {done}{of}", None, None if training else done)

    def _start(self, total: int | None) -> None:
        if not self._enabled:
            return
        columns = TextColumn("{task.description}"), BarColumn(None), TextColumn("{task.fields[text]}")
        self._bar = Progress(*columns, console=self._console, transient=True, expand=True, refresh_per_second=4)
        self._task = self._bar.add_task("", total=total, text="")
        self._bar.start()
        self._began = time.perf_counter()

    def _update(self, description: str, text: str | None, done: int | None) -> None:
        if self._bar is not None:
            fields: dict[str, Any] = {} if text is None else {"text": text}
            self._bar.update(self._task, description=description, completed=done, **fields)

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _trains(trainer: Trainer) -> bool:
    """Whether a validation is one between epochs of training."""
    return trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking


def _metrics(trainer: Trainer) -> list[str]:
    """The latest values of the metrics that checkpoints are selected by."""
    known = trainer.callback_metrics
    return [f"{name} {float(known[name]):.4g}" for name in monitored(trainer) if name in known]


def _batches(trainer: Trainer) -> int | None:
    """The training batches of the whole run, or None if it has no end."""
    ends: list[float] = []
    if trainer.max_steps > 0:
        ends.append(trainer.max_steps * trainer.accumulate_grad_batches)
    if (trainer.max_epochs or -1) > 0:
        ends.append((trainer.max_epochs or 1) * trainer.num_training_batches)
    return None if not ends or min(ends) == float("inf") else int(min(ends))


def _done(trainer: Trainer) -> int:
    """The training batches so far, those before a resume included."""
    return int(trainer.fit_loop.epoch_loop.total_batch_idx + 1)


def _total(batches: Any) -> int | None:
    """The batches of all loaders, or None if one has no end."""
    total = sum(batches) if isinstance(batches, list) else batches
    return None if total == float("inf") else int(total)


def _clock(seconds: float) -> str:
    """As 1:02:03, or 2:03 below an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
