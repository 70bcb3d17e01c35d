"""Stops a run whose loss becomes NaN or infinite, with a diagnosis and the name of the last good checkpoint."""

import math
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor


class FiniteLoss(Callback):
    """Stops training before a loss that is not finite changes the weights, and before such weights are saved.

    The task's diagnosis of the batch is printed and written to diagnosis.txt in the run's folder (with several
    processes, each one with a loss that is not finite writes diagnosis_rankN.txt). All processes stop.

    The loss is checked at every step, the weights at every checkpoint, including those with save_weights_only: a step
    may spoil them after the epoch's last loss. Gradients are not checked, because float16 mixed precision skips the
    steps where they overflow.
    """

    def __init__(self) -> None:
        self._batch: Any = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Keeps the batch for the diagnosis."""
        self._batch = batch

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Checks the loss. A gradient scaler may have multiplied it; it is float32, so that does not overflow.

        Raises:
            FloatingPointError: the loss is not finite in this or another process.
        """
        value = loss.item()
        if not trainer.strategy.reduce_boolean_decision(math.isfinite(value)):
            self._stop(trainer, pl_module, "loss", None if math.isfinite(value) else f"is {value}")

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Checks the weights, so that the last good checkpoint is not overwritten.

        Raises:
            FloatingPointError: a weight is not finite.
        """
        parameters = {name for name, _ in pl_module.named_parameters()}
        weights = [one for name, one in checkpoint["state_dict"].items() if name in parameters]
        finite = all(bool(one.isfinite().all()) for one in weights if isinstance(one, Tensor))
        if not trainer.strategy.reduce_boolean_decision(finite):
            self._stop(trainer, pl_module, "weights", None if finite else "are not finite, so no checkpoint is written")

    def _stop(self, trainer: Trainer, pl_module: LightningModule, what: str, finding: str | None) -> None:
        """Every process diagnoses, because norms may share statistics; those with a finding write a report."""
        report = _report(trainer, pl_module, self._batch)
        folder = Path(trainer.log_dir or trainer.default_root_dir)  # a collective operation
        place = f"epoch {trainer.current_epoch}, step {trainer.global_step}"
        name = "diagnosis.txt" if trainer.world_size == 1 else f"diagnosis_rank{trainer.global_rank}.txt"
        if finding is None:
            finding, name = "of another process is not finite", "diagnosis_rank*.txt"
        else:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(f"{what} {finding} ({place})\n{report}\n", encoding="utf-8")
            print(report, flush=True)
        trainer.strategy.barrier()  # the launcher ends the others as soon as one process ends
        raise FloatingPointError(f"the {what} {finding} ({place}): see {folder / name}; {_last_good(trainer)}")


def _report(trainer: Trainer, pl_module: Any, batch: Any) -> str:
    """The diagnosis, computed in the precision of training."""
    try:
        with trainer.precision_plugin.forward_context():
            found = pl_module.diagnose(batch)
    except Exception as error:  # sharded parameters, another kind of module, out of memory
        return f"there is no diagnosis: {type(error).__name__}: {error}"
    again = "\nnote: computed again, this batch's loss is finite: random numbers (mixing, dropout) made the difference"
    return f"{found}{again if math.isfinite(found.loss) else ''}"


def _last_good(trainer: Trainer) -> str:
    """Names the newest checkpoint, whose weights this callback has checked."""
    paths = [trainer.ckpt_path]
    for callback in trainer.checkpoint_callbacks:
        paths += [getattr(callback, name, None) for name in ("best_model_path", "last_model_path")]
    files = {Path(path) for path in paths if path and Path(path).is_file()}
    if not files:
        return "there is no checkpoint yet"
    newest = max(files, key=lambda file: file.stat().st_mtime)
    content = torch.load(newest, map_location="cpu", weights_only=True, mmap=True)
    return f"the last good checkpoint is {newest} (step {content['global_step']})"
