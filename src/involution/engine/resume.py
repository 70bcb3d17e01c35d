"""Callbacks for resuming: best score and epoch counter from the checkpoint, options from the command line."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BaseFinetuning, EarlyStopping, ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info


class BestCheckpoint(ModelCheckpoint):
    """ModelCheckpoint that, on resume, still knows the best checkpoints and scores of the run that it continues.

    Lightning drops them where the folder changes, as it does here with every run; the first epoch after a resume would
    then become the best one, however bad. A best checkpoint of the earlier run stays where it is. It is found in its
    folder or beside the checkpoint that the run resumes from; its score counts only while the file exists.
    """

    _resumed_from: Path | None = None

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Records the checkpoint that training resumes from, before states are restored."""
        super().on_load_checkpoint(trainer, pl_module, checkpoint)
        self._resumed_from = Path(trainer.ckpt_path) if trainer.training and trainer.ckpt_path else None

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores paths and scores of the checkpoints whose files exist."""
        recorded = state_dict["best_k_models"]
        found = {self._existing(path): score for path, score in recorded.items()}
        missing = [path for path in recorded if self._existing(path) is None]
        kept = {path: score for path, score in found.items() if path is not None}
        if missing and self._resumed_from is not None:
            scores = ", ".join(f"{path} ({self.monitor} {float(recorded[path]):.4f})" for path in missing)
            rank_zero_info(f"new checkpoints are not compared with these, whose files do not exist: {scores}")
        best, worst = (min, max) if self.mode == "min" else (max, min)
        if len(kept) > self.save_top_k > 0:  # the earlier run kept more
            ranked = sorted(kept, key=lambda path: float(kept[path]), reverse=self.mode == "max")
            kept = {path: kept[path] for path in ranked[: self.save_top_k]}
        best_path = best(kept, key=lambda path: kept[path]) if kept else ""
        kth_path = worst(kept, key=lambda path: kept[path]) if len(kept) == self.save_top_k else ""
        restored = {
            "dirpath": self.dirpath,
            "best_k_models": kept,
            "best_model_path": best_path,
            "best_model_score": kept.get(best_path),
            "kth_best_model_path": kth_path,
            "kth_value": kept.get(kth_path, self.kth_value),
        }
        super().load_state_dict(state_dict | (restored if self.monitor else {}))

    def _existing(self, path: str) -> str | None:
        """The path, or that of a file of its name beside the checkpoint that the run resumes from."""
        beside = [self._resumed_from.with_name(Path(path).name)] if self._resumed_from is not None else []
        return next((str(file) for file in (Path(path), *beside) if file.is_file()), None)


class GivenOptions(Callback):
    """On resume, keeps options of this run that Lightning would overwrite with the checkpoint's.

    These are all options of the optimizers' parameter groups (learning rate, momentum, weight decay, ...) and the
    patience of early stopping. What a scheduler writes depends on its kind, for each optimizer: with a LambdaLR the
    learning rate is this run's initial rate times the factor at the checkpoint's step; any other scheduler continues
    from the checkpoint's learning rate, and momentum where it cycles that (OneCycleLR, CyclicLR).
    """

    def __init__(self) -> None:
        self._patience: list[tuple[EarlyStopping, int]] = []
        self._groups: list[list[dict[str, Any]]] = []
        self._trained: int | None = None  # the parameters that the checkpoint's optimizers train

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Records the patience, before callbacks are restored."""
        stopping: list[Any] = [one for one in trainer.callbacks if isinstance(one, EarlyStopping)]  # type: ignore[attr-defined]
        self._patience = [(one, one.patience) for one in stopping]

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Counts the parameters of the checkpoint's optimizers."""
        groups = [group for state in checkpoint.get("optimizer_states", []) for group in state["param_groups"]]
        self._trained = sum(len(group["params"]) for group in groups) if groups else None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Records the optimizers' options, before they are restored.

        Raises:
            ValueError: the checkpoint's run trained other parameters.
        """
        found = sum(len(group["params"]) for optimizer in trainer.optimizers for group in optimizer.param_groups)
        unfreezing = any(isinstance(one, BaseFinetuning) for one in trainer.callbacks)  # type: ignore[attr-defined]
        if self._trained not in (None, found) and not unfreezing:
            raise ValueError(
                f"the trained parameters must be the checkpoint's, {self._trained} tensors, got {found}; options that "
                "freeze parameters, such as model.frozen_stages, must be left out on resume, or ckpt_path, to start "
                "another run from these weights by model.init_from"
            )
        self._groups = [
            [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
            for optimizer in trainer.optimizers
        ]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restores this run's options."""
        for stopping, patience in self._patience:
            stopping.patience = patience
        schedulers: list[Any] = [config.scheduler for config in trainer.lr_scheduler_configs]
        for optimizer, groups in zip(trainer.optimizers, self._groups, strict=True):
            own = [one for one in schedulers if one.optimizer is optimizer]
            skipped = {name for one in own for name in _scheduled_options(one)}
            for group, given in zip(optimizer.param_groups, groups, strict=False):  # callbacks may add groups
                group.update({name: value for name, value in given.items() if name not in skipped})
            if own and not skipped:
                for scheduler in own:
                    _recompute_rates(scheduler)


def _scheduled_options(scheduler: Any) -> set[str]:
    """The options of an optimizer that a scheduler computes from the checkpoint's state; none for a LambdaLR."""
    if isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR):
        return set()
    cycles = getattr(scheduler, "cycle_momentum", False)
    # Of Adam, OneCycleLR and CyclicLR cycle beta1. OneCycleLR also stores its bounds in the groups.
    bounds = {"max_lr", "min_lr", "max_momentum", "base_momentum"}
    return {"lr", "initial_lr", *bounds} | ({"momentum", "betas"} if cycles else set())


def _recompute_rates(scheduler: torch.optim.lr_scheduler.LambdaLR) -> None:
    """Sets the learning rates to the groups' initial ones, times the factors of the scheduler's step."""
    groups = scheduler.optimizer.param_groups
    scheduler.base_lrs = [group["initial_lr"] for group in groups]
    for group, base, factor in zip(groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=False):
        group["lr"] = base * factor(scheduler.last_epoch)
    scheduler._last_lr = [group["lr"] for group in groups]


class EpochCounterFix(Callback):
    """On resume, counts epochs as the uninterrupted run does; matters where max_steps limits the run.

    On resume Lightning (a) treats an epoch cut short by max_steps as complete, and (b) increments the counter again for
    a checkpoint that an epoch's end saved. Either gives the sampler a wrong epoch, and so another order of the images.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Corrects the counters by whether the checkpoint's epoch has batches left."""
        loop: Any = trainer.fit_loop
        progress = loop.epoch_progress
        if not loop.epoch_loop.batch_progress.is_last_batch:
            # (a) In epoch e: before, processed = e + 1 and completed = e; after, both are e, and the epoch continues.
            progress.current.processed = min(progress.current.processed, progress.current.completed)
            progress.total.processed = min(progress.total.processed, progress.total.completed)
        elif loop.restarted_on_epoch_end:
            # (b) After epoch e: before, processed = e + 1 and completed = e; after, both are e + 1. The restart stage
            # is cleared, so that Lightning does not increment again.
            loop.epoch_progress.increment_completed()
            loop.reset_restart_stage()
            loop._restarting = loop.epoch_loop._restarting = False


def resume_position(trainer: Trainer) -> tuple[int, int]:
    """The epoch that a resumed run continues with, and the number of its batches already done.

    Batches are those of one process; the data module multiplies them by its batch size to skip samples.
    """
    epochs: Any = trainer.fit_loop.epoch_progress.current
    batches = trainer.fit_loop.epoch_loop.batch_progress
    if epochs.ready == 0:
        return 0, 0
    return (epochs.ready, 0) if batches.is_last_batch else (epochs.ready - 1, batches.current.ready)
