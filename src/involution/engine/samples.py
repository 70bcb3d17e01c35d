"""Sample predictions of every validation, as pictures in TensorBoard."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torchvision.transforms.v2.functional import pil_to_tensor

from .module import TaskModule

COUNT = 8  # images of a validation, at most


class Samples(Callback):
    """Logs val/predictions, the picture that the task draws of a validation's first images."""

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Draws the first batch. All processes run the network, which sharded ones do together."""
        loggers = [one for one in trainer.loggers if isinstance(one, TensorBoardLogger)]
        if batch_idx or dataloader_idx or trainer.sanity_checking or not loggers:
            return
        if not isinstance(pl_module, TaskModule):
            return
        picture = pl_module.illustrate(batch, COUNT)
        if picture is not None and trainer.is_global_zero:
            loggers[0].experiment.add_image("val/predictions", pil_to_tensor(picture), trainer.global_step)
