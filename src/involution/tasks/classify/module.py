"""Training and evaluation of an image classifier."""

import math
from collections.abc import Sequence
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from jsonargparse.typing import NonNegativeInt, PositiveInt
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy
from torchvision.transforms import v2

from ... import zoo  # noqa: F401  (registers our models with timm)
from ...engine.module import TaskModule, linear_warmup
from ...nn import Diagnosis, diagnose
from ...zoo.checkpoints import load_network
from .predictions import RankingWriter, cell, draw_grid
from .preprocessing import Preprocessing

Batch = tuple[Tensor, Tensor]


def warmup_cosine(step: int, total: int, warmup: int, warmup_ratio: float) -> float:
    """Factor of the peak learning rate at a step: linear from `warmup_ratio` to 1, then cosine to 0."""
    if step < warmup:
        return linear_warmup(step, warmup, warmup_ratio)
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return 0.5 * (1 + math.cos(math.pi * progress))


def _mixing(mixup: float, cutmix: float, num_classes: int) -> v2.Transform | None:
    for name, alpha in (("mixup", mixup), ("cutmix", cutmix)):
        if alpha < 0:
            raise ValueError(f"{name} must be at least 0, got {alpha!r}")
    kinds = [(v2.MixUp, mixup), (v2.CutMix, cutmix)]
    made = [kind(alpha=alpha, num_classes=num_classes) for kind, alpha in kinds if alpha > 0]
    return v2.RandomChoice(made) if made else None


class Classifier(TaskModule):
    """A timm model, trained with Nesterov SGD, linear warm-up, cosine decay and label smoothing (the paper's recipe).

    Batches are (images, labels): [N, 3, H, W] float and [N] int64. Logs loss, accuracy and, from five classes on,
    top5 under train/, val/ and test/ (accuracies as fractions of 1), the learning rate as lr, and the wall time of an
    epoch, its validation included, as train/seconds. Label smoothing and mixing act in training only; training accuracy
    under mixing is against the unmixed labels.

    A checkpoint stores the model's arguments, class names and preprocessing, for `involution predict`.

    Args:
        model_name: any name that timm.create_model accepts, ours included.
        num_classes: length of the model's output; `involution fit` takes it from the data.
        model_kwargs: further arguments of timm.create_model. checkpoint_path may be a checkpoint of `involution fit`, a
            state dict or .safetensors; its last layer is ignored if its number of classes differs.
        lr: peak learning rate.
        lr_batch_size: images per optimizer step (over all processes and accumulated batches) that `lr` and
            `warmup_steps` are meant for; with other batches lr scales in proportion, warmup_steps inversely. None
            scales nothing.
        momentum: of SGD.
        weight_decay: of weights; norms and biases have none unless `decay_all`.
        decay_all: weight decay of norms and biases too, as in the paper's ImageNet training.
        warmup_steps: optimizer steps of linear warm-up.
        warmup_ratio: the learning rate at the first step, as a fraction of `lr`.
        label_smoothing: in [0, 1).
        mixup: alpha of mixup's Beta distribution; 0 disables it.
        cutmix: alpha of CutMix's; with both, each batch uses one of the two at random.
        channels_last: memory format of weights and images; involution is fastest with it on CPU.
        init_from: weights that training starts from, as far as they fit: a checkpoint of `involution fit`, another
            weight file, or a name whose pretrained weights timm downloads, such as resnet50. RedNet accepts those of a
            ResNet of its depth, see `zoo.load_resnet`.

    Raises:
        ValueError: timm does not know `model_name`; there is only one class; mixup or cutmix is negative; the number of
            classes of the data differs, or init_from does not fit (once the trainer starts).
    """

    preprocessing_type = Preprocessing

    def __init__(
        self,
        model_name: str,
        num_classes: int,
        model_kwargs: dict[str, Any] | None = None,
        lr: float = 0.1,
        lr_batch_size: int | None = None,
        momentum: float = 0.9,
        weight_decay: float = 1e-4,
        decay_all: bool = False,
        warmup_steps: int = 0,
        warmup_ratio: float = 0.25,
        label_smoothing: float = 0.0,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        channels_last: bool = True,
        init_from: str | None = None,
    ) -> None:
        super().__init__(num_classes, channels_last, init_from)
        self.save_hyperparameters()
        self.check_rates()
        if num_classes < 2:
            raise ValueError(f"num_classes must be at least 2, got {num_classes!r}: with one, every answer is right")
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing must be in [0, 1), got {label_smoothing!r}")
        self._mixing = _mixing(mixup, cutmix, num_classes)
        if not timm.is_model(model_name.partition(".")[0]) and ":" not in model_name:
            close = get_close_matches(model_name, timm.list_models(), 3)
            raise ValueError(
                f"model_name must be a model of timm's, got {model_name!r}; timm.list_models() lists them"
                + (f", {', '.join(close)} among them" if close else "")
            )
        options = dict(model_kwargs or {})
        weights = options.pop("checkpoint_path", None)
        net = timm.create_model(model_name, num_classes=num_classes, **options)
        if weights:
            left_out = load_network(net, Path(weights))
            rank_zero_info(f"checkpoint_path: loaded every tensor of the network; ignored: {left_out or 'none'}")
        self.net: nn.Module = net.to(memory_format=self.memory_format)
        # By name: FSDP flattens parameters before there is an optimizer.
        self._decayed = {name for name, parameter in net.named_parameters() if parameter.ndim > 1}
        # Loading a checkpoint needs no other weights.
        sources = ("pretrained", "checkpoint_path")
        if model_kwargs is not None:
            self.hparams["model_kwargs"] = {k: v for k, v in model_kwargs.items() if k not in sources}
        metrics = {"accuracy": MulticlassAccuracy(num_classes, average="micro")}
        if num_classes >= 5:
            metrics["top5"] = MulticlassAccuracy(num_classes, average="micro", top_k=5)
        self.train_metrics, self.val_metrics, self.test_metrics = (
            MetricCollection(dict(metrics), prefix=f"{stage}/").clone() for stage in ("train", "val", "test")
        )
        # Metrics, because Lightning's mean over processes does not weight by the images of each.
        self.train_loss, self.val_loss, self.test_loss = MeanMetric(), MeanMetric(), MeanMetric()

    @staticmethod
    def collate(images: list[Tensor]) -> Tensor:
        """Images [3, H, W] -> [N, 3, H, W]."""
        return torch.stack(images)

    def forward(self, images: Tensor) -> Tensor:
        """[N, 3, H, W] -> logits [N, num_classes]."""
        logits: Tensor = self.net(images.to(memory_format=self.memory_format))
        return logits

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The mean loss over the batch, with label smoothing and, if enabled, mixed images."""
        self.log("lr", self.trainer.optimizers[0].param_groups[0]["lr"])
        return self._step(batch, "train", self.train_metrics, self.hparams["label_smoothing"], self._mixing)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Logs val/loss and the accuracies."""
        self._step(batch, "val", self.val_metrics)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Logs test/loss and the accuracies."""
        self._step(batch, "test", self.test_metrics)

    def predict_step(self, images: Tensor, batch_idx: int) -> Tensor:
        """[N, 3, H, W] -> probabilities [N, num_classes]."""
        probabilities: Tensor = self(images).softmax(dim=1)
        return probabilities

    def illustrate(self, batch: Batch, count: int) -> Image.Image:
        """Images with the most probable class and, if it is wrong, the label."""
        images, labels = batch[0][:count], batch[1][:count].tolist()
        cells = []
        for image, label, scores in zip(images, labels, self.predict_step(images, 0).float().cpu(), strict=True):
            best = int(scores.argmax())
            name = self.classes[best] if best == label else f"{self.classes[best]}, is {self.classes[label]}"
            cells.append((cell(self.pixels(image)), [(name, scores[best].item())]))
        return draw_grid(cells, 4)

    def _step(
        self,
        batch: Batch,
        stage: str,
        metrics: MetricCollection,
        label_smoothing: float = 0.0,
        mixing: v2.Transform | None = None,
    ) -> Tensor:
        images, labels = batch
        inputs, targets = (images, labels) if mixing is None else mixing(images, labels)
        logits = self(inputs)
        loss = F.cross_entropy(logits, targets, label_smoothing=label_smoothing)
        metrics.update(logits, labels)
        when: dict[str, Any] = {"on_step": False, "on_epoch": True, "batch_size": len(labels)}
        mean: MeanMetric = getattr(self, f"{stage}_loss")
        mean.update(loss.detach(), len(labels))
        self.log(f"{stage}/loss", mean, prog_bar=stage == "train", **when)
        self.log_dict(metrics, prog_bar=stage == "val", **when)
        return loss

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the network's own weights as "state_dict_ema", which timm.create_model(checkpoint_path=...) reads first.

        The tensors share their storage with "state_dict", so the file does not grow. Sharded ones are left out.
        """
        super().on_save_checkpoint(checkpoint)
        weights = {name: one for name, one in checkpoint["state_dict"].items() if name.startswith("net.")}
        if all(type(one) is Tensor for one in weights.values()):
            checkpoint["state_dict_ema"] = {name.removeprefix("net."): one for name, one in weights.items()}

    def diagnose(self, batch: Batch) -> Diagnosis:
        """Statistics of the network's involutions on a training batch; images are not mixed."""
        images, labels = batch
        loss = partial(F.cross_entropy, target=labels, label_smoothing=self.hparams["label_smoothing"])
        return diagnose(self.net, images.to(memory_format=self.memory_format), loss)

    def unlabelled(self, images: list[Tensor]) -> Batch:
        """A batch whose labels are all class 0."""
        return torch.stack(images), torch.zeros(len(images), dtype=torch.long)

    def writer(
        self,
        folder: Path,
        files: Sequence[Path],
        top_k: PositiveInt = 5,
        grid: NonNegativeInt = 0,
        grid_columns: PositiveInt = 6,
    ) -> RankingWriter:
        """Writes predictions.csv, and shows the most probable classes of the first images.

        Args:
            folder: the folder for the results.
            files: the images.
            top_k: classes per image.
            grid: number of images in predictions.png, a picture of images with their classes; 0 writes none.
            grid_columns: images in a row of it.
        """
        return RankingWriter(folder, files, self.classes, top_k, grid, grid_columns)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """SGD, with the schedule applied at every step."""
        given = self.hparams
        decayed: list[nn.Parameter] = []
        others: list[nn.Parameter] = []
        for name, parameter in self.net.named_parameters():
            if parameter.requires_grad:
                kind = decayed if name.replace("_fsdp_wrapped_module.", "") in self._decayed else others
                kind.append(parameter)
        groups = [
            {"params": decayed, "weight_decay": given["weight_decay"]},
            {"params": others, "weight_decay": given["weight_decay"] if given["decay_all"] else 0.0},
        ]
        scale = self.lr_scale(given["lr_batch_size"])
        momentum = given["momentum"]
        optimizer = torch.optim.SGD(groups, lr=given["lr"] * scale, momentum=momentum, nesterov=momentum > 0)
        factor = partial(
            warmup_cosine,
            total=self.training_steps(),
            warmup=round(given["warmup_steps"] / scale),
            warmup_ratio=given["warmup_ratio"],
        )
        return self.scheduled(optimizer, factor)
