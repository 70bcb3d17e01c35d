"""A run whose loss stops being finite ends there, with a diagnosis and the name of the last good checkpoint."""

import math
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor


class FiniteLoss(Callback):
    """Ends training before a loss that is NaN or infinite reaches the weights, and before such weights reach a file.

    The task's diagnosis of the batch goes to the screen and to diagnosis.txt in the run's folder (of several processes
    each one whose loss is not finite writes its own, diagnosis_rank1.txt, ...). All processes stop.

    Gradients are not looked at: mixed precision in float16 skips steps where they overflow, and rightly so. It is the
    loss that counts, and at every checkpoint the weights: a step may spoil them after the epoch's last loss.
    """

    def __init__(self) -> None:
        self._batch: Any = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Keeps the batch, for the diagnosis."""
        self._batch = batch

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Looks at the loss; a gradient scaler's factor, which it may have here, does not make it overflow.

        Raises:
            FloatingPointError: it is not finite, in this or another process.
        """
        value = loss.item()
        if not trainer.strategy.reduce_boolean_decision(math.isfinite(value)):
            self._stop(trainer, pl_module, "loss", None if math.isfinite(value) else f"is {value}")

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Looks at the weights, which a checkpoint must not replace good ones with.

        Raises:
            FloatingPointError: some are not finite.
        """
        parameters = {name for name, _ in pl_module.named_parameters()}
        weights = [one for name, one in checkpoint["state_dict"].items() if name in parameters]
        finite = all(bool(one.isfinite().all()) for one in weights if isinstance(one, Tensor))
        if not trainer.strategy.reduce_boolean_decision(finite):
            self._stop(trainer, pl_module, "weights", None if finite else "are not finite, so no checkpoint is written")

    def _stop(self, trainer: Trainer, pl_module: LightningModule, what: str, finding: str | None) -> None:
        """Every process diagnoses, as norms may share their statistics; those with a finding report."""
        report = _report(trainer, pl_module, self._batch)
        folder = Path(trainer.log_dir or trainer.default_root_dir)  # asks the other processes
        place = f"epoch {trainer.current_epoch}, step {trainer.global_step}"
        name = "diagnosis.txt" if trainer.world_size == 1 else f"diagnosis_rank{trainer.global_rank}.txt"
        if finding is None:
            finding, name = "of another process is not finite", "diagnosis_rank*.txt"
        else:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(f"{what} {finding} ({place})\n{report}\n")
            print(report, flush=True)
        trainer.strategy.barrier()  # the first process that ends has its launcher end the others
        raise FloatingPointError(f"the {what} {finding} ({place}): see {folder / name}; {_last_good(trainer)}")


def _report(trainer: Trainer, pl_module: Any, batch: Any) -> str:
    """What is wrong, in the precision of training."""
    try:
        with trainer.precision_plugin.forward_context():
            found = pl_module.diagnose(batch)
    except Exception as error:  # parameters that are sharded, a module that is none of ours, no memory left
        return f"there is no diagnosis: {type(error).__name__}: {error}"
    again = "\nnote: computed again, this batch's loss is finite: random numbers (mixing, dropout) made the difference"
    return f"{found}{again if math.isfinite(found.loss) else ''}"


def _last_good(trainer: Trainer) -> str:
    """Names the newest checkpoint: this callback has seen to it that its weights are finite."""
    paths = [trainer.ckpt_path]
    for callback in trainer.checkpoint_callbacks:
        paths += [getattr(callback, name, None) for name in ("best_model_path", "last_model_path")]
    files = {Path(path) for path in paths if path and Path(path).is_file()}
    if not files:
        return "there is no checkpoint yet"
    newest = max(files, key=lambda file: file.stat().st_mtime)
    content = torch.load(newest, map_location="cpu", weights_only=True, mmap=True)
    return f"the last good checkpoint is {newest} (step {content['global_step']})"
