"""Training and evaluating an image classifier."""

import csv
import math
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from ... import zoo  # noqa: F401  (registers our models with timm)
from .data import ClassificationData

Batch = tuple[Tensor, Tensor]


def warmup_cosine(step: int, total: int, warmup: int, warmup_ratio: float) -> float:
    """The learning rate at a step, as a factor of its peak: linear from `warmup_ratio` to 1, then cosine to 0."""
    if step < warmup:
        return warmup_ratio + (1 - warmup_ratio) * step / warmup
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return 0.5 * (1 + math.cos(math.pi * progress))


class Classifier(LightningModule):
    """A timm model, trained with Nesterov SGD, linear warm-up, cosine decay and label smoothing (the paper's recipe).

    Batches are (images, labels): [N, 3, H, W] float and [N] int64. Logs loss, accuracy and, from five classes on,
    top5 under train/, val/ and test/ (accuracies as fractions of 1), the learning rate as lr, and the wall time of an
    epoch, its validation included, as train/seconds. Label smoothing acts on the training loss only.

    Args:
        model_name: any name that timm.create_model takes, ours included.
        num_classes: length of the model's output; `involution fit` fills it in from the data.
        model_kwargs: further arguments of timm.create_model.
        lr: peak learning rate.
        lr_batch_size: images in one optimizer step that `lr` and `warmup_steps` are meant for, all processes and
            accumulated batches together; with another number, lr scales with it and warmup_steps against it. None:
            nothing scales.
        momentum: of SGD.
        weight_decay: of weights; norms and biases have none.
        warmup_steps: optimizer steps of linear warm-up.
        warmup_ratio: the learning rate at the first step, as a fraction of `lr`.
        label_smoothing: in [0, 1).
        channels_last: the memory format of weights and images; on CPU involution is fastest with it.

    Raises:
        RuntimeError: timm does not know `model_name`.
        ValueError: the data have another number of classes (once the trainer starts).
    """

    def __init__(
        self,
        model_name: str,
        num_classes: int,
        model_kwargs: dict[str, Any] | None = None,
        lr: float = 0.1,
        lr_batch_size: int | None = None,
        momentum: float = 0.9,
        weight_decay: float = 1e-4,
        warmup_steps: int = 0,
        warmup_ratio: float = 0.25,
        label_smoothing: float = 0.0,
        channels_last: bool = True,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.num_classes = num_classes
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        net = timm.create_model(model_name, num_classes=num_classes, **(model_kwargs or {}))
        self.net: nn.Module = net.to(memory_format=self.memory_format)
        metrics = {"accuracy": MulticlassAccuracy(num_classes, average="micro")}
        if num_classes >= 5:
            metrics["top5"] = MulticlassAccuracy(num_classes, average="micro", top_k=5)
        self.train_metrics, self.val_metrics, self.test_metrics = (
            MetricCollection(dict(metrics), prefix=f"{stage}/").clone() for stage in ("train", "val", "test")
        )

    def setup(self, stage: str) -> None:
        """Refuses data with another number of classes."""
        found = getattr(getattr(self.trainer, "datamodule", None), "num_classes", self.num_classes)
        if found != self.num_classes:
            raise ValueError(f"num_classes of the model is {self.num_classes}, but the data have {found} classes")

    def forward(self, images: Tensor) -> Tensor:
        """[N, 3, H, W] -> logits [N, num_classes]."""
        logits: Tensor = self.net(images.to(memory_format=self.memory_format))
        return logits

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The mean loss over the batch, with label smoothing."""
        self.log("lr", self.trainer.optimizers[0].param_groups[0]["lr"])
        return self._step(batch, "train", self.train_metrics, self.hparams["label_smoothing"])

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Logs val/loss and the accuracies."""
        self._step(batch, "val", self.val_metrics)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Logs test/loss and the accuracies."""
        self._step(batch, "test", self.test_metrics)

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Probabilities, [N, num_classes]."""
        probabilities: Tensor = self(batch[0]).softmax(dim=1)
        return probabilities

    def _step(self, batch: Batch, stage: str, metrics: MetricCollection, label_smoothing: float = 0.0) -> Tensor:
        images, labels = batch
        logits = self(images)
        loss = F.cross_entropy(logits, labels, label_smoothing=label_smoothing)
        metrics.update(logits, labels)
        when: dict[str, Any] = {"on_step": False, "on_epoch": True, "batch_size": len(labels)}
        self.log(f"{stage}/loss", loss, prog_bar=stage == "train", **when)
        self.log_dict(metrics, prog_bar=stage == "val", **when)
        return loss

    def write_predictions(self, outputs: Sequence[Tensor], data: ClassificationData, file: Path) -> None:
        """Writes a CSV file of image, class and probability, the likeliest class of each image.

        Args:
            outputs: what `predict_step` returned, batch by batch.
            data: what was predicted; gives the names of images and classes.
            file: to write.
        """
        likeliest = torch.cat(list(outputs)).max(dim=1)
        with file.open("w", newline="") as stream:
            writer = csv.writer(stream)
            writer.writerow(["image", "class", "probability"])
            for name, index, probability in zip(data.image_names(), likeliest.indices, likeliest.values, strict=False):
                writer.writerow([name, data.classes[int(index)], f"{float(probability):.4f}"])

    def on_train_start(self) -> None:
        """Starts the clock of an epoch in whose midst a resumed run begins: of it, only the rest is timed."""
        self._started = time.perf_counter()

    def on_train_epoch_start(self) -> None:
        """Starts the epoch's clock."""
        self._started = time.perf_counter()

    def on_train_epoch_end(self) -> None:
        """Logs train/seconds."""
        self.log("train/seconds", time.perf_counter() - self._started)

    def _images_per_step(self) -> int:
        trainer: Any = self.trainer
        return int(trainer.datamodule.batch_size * trainer.world_size * trainer.accumulate_grad_batches)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """SGD, and the schedule stepped at every batch."""
        given = self.hparams
        parameters = [parameter for parameter in self.net.parameters() if parameter.requires_grad]
        groups = [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": given["weight_decay"]},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
        scale = self._images_per_step() / given["lr_batch_size"] if given["lr_batch_size"] else 1.0
        optimizer = torch.optim.SGD(groups, lr=given["lr"] * scale, momentum=given["momentum"], nesterov=True)
        factor = partial(
            warmup_cosine,
            total=int(self.trainer.estimated_stepping_batches),
            warmup=round(given["warmup_steps"] / scale),
            warmup_ratio=given["warmup_ratio"],
        )
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
