"""Resuming a run: the options that it was given stay in force, and epochs are counted right."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping


class GivenOptions(Callback):
    """Keeps options in force that Lightning takes from the checkpoint on resume.

    These are the learning rate, momentum and weight decay, which are in the optimizer's and the schedule's states, and
    the patience of early stopping. The step that the schedule is at stays the checkpoint's.
    """

    def __init__(self) -> None:
        self._patience: list[tuple[EarlyStopping, int]] = []
        self._groups: list[list[dict[str, Any]]] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Notes the patience, before callbacks are restored."""
        stopping: list[Any] = [one for one in trainer.callbacks if isinstance(one, EarlyStopping)]  # type: ignore[attr-defined]
        self._patience = [(one, one.patience) for one in stopping]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Notes the optimizers' options, before they are restored."""
        self._groups = [
            [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
            for optimizer in trainer.optimizers
        ]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Puts them back."""
        for stopping, patience in self._patience:
            stopping.patience = patience
        schedules: list[Any] = [config.scheduler for config in trainer.lr_scheduler_configs]
        multiples = [one for one in schedules if isinstance(one, torch.optim.lr_scheduler.LambdaLR)]
        # Another kind of schedule computes rates from those before: they stay the checkpoint's.
        rates = {"lr", "initial_lr"} if len(multiples) < len(schedules) else set()
        for optimizer, groups in zip(trainer.optimizers, self._groups, strict=True):
            for group, given in zip(optimizer.param_groups, groups, strict=False):  # finetuning callbacks add groups
                group.update({name: value for name, value in given.items() if name not in rates})
        for schedule in multiples:
            groups = schedule.optimizer.param_groups
            schedule.base_lrs = [group["initial_lr"] for group in groups]
            for group, base, factor in zip(groups, schedule.base_lrs, schedule.lr_lambdas, strict=False):
                group["lr"] = base * factor(schedule.last_epoch)
            schedule._last_lr = [group["lr"] for group in groups]


class EpochCounterFix(Callback):
    """Counts the epochs of runs whose length is a number of steps as if they had not been interrupted.

    Lightning takes an epoch that the checkpoint finished for one to go on with, finds it without batches, and counts it
    twice; and one that the last step broke off for finished. The images' order would be another one.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Says whether anything is left of the checkpoint's epoch."""
        loop: Any = trainer.fit_loop
        progress = loop.epoch_progress
        if not loop.epoch_loop.batch_progress.is_last_batch:
            progress.current.processed = min(progress.current.processed, progress.current.completed)
            progress.total.processed = min(progress.total.processed, progress.total.completed)
        elif loop.restarted_on_epoch_end:
            loop.epoch_progress.increment_completed()
            loop.reset_restart_stage()
            loop._restarting = loop.epoch_loop._restarting = False


def place_in_epoch(trainer: Trainer) -> tuple[int, int]:
    """The epoch that training would go on with now, and how many of its batches it has seen."""
    epochs: Any = trainer.fit_loop.epoch_progress.current
    batches = trainer.fit_loop.epoch_loop.batch_progress
    if epochs.ready == 0:
        return 0, 0
    return (epochs.ready, 0) if batches.is_last_batch else (epochs.ready - 1, batches.current.ready)
