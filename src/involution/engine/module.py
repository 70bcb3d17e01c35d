"""What the Lightning modules of every task share: class names and preprocessing that travel along, an epoch's time."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn

from ..nn import Diagnosis
from ..zoo.checkpoints import load_backbone
from ..zoo.warm_start import load_resnet
from .data import TaskData
from .images import read_image


def _difference(theirs: Sequence[str], ours: Sequence[str]) -> str:
    """Says how a checkpoint's classes are not the data's."""
    for index, (one, other) in enumerate(zip(theirs, ours, strict=False)):
        if one != other:
            return f"the checkpoint's classes must be the data's, but class {index} is {one!r} there and {other!r} here"
    return f"the checkpoint's classes must be the data's, but they are {len(theirs)} there and {len(ours)} here"


@dataclass(frozen=True)
class Reader:
    """Reads image files, and preprocesses them."""

    transform: Callable[[Any], Any]

    def __call__(self, file: Path) -> Any:
        """What the transform makes of an image file.

        Raises:
            UnreadableImage: it cannot be read.
        """
        return self.transform(read_image(file))


def linear_warmup(step: int, warmup: int, ratio: float) -> float:
    """A factor of the learning rate that grows from `ratio` to 1 in `warmup` steps."""
    return ratio + (1 - ratio) * step / warmup if step < warmup else 1.0


class TaskModule(LightningModule):
    """Takes class names and preprocessing from the data module, and carries them in checkpoints.

    A subclass has `net`, the network, `task`, the room that it is of, and `preprocessing_type`, a NamedTuple of plain
    values. An epoch's wall time, its validation included, is logged as train/seconds.

    Args:
        num_classes: that the network is made for.
        channels_last: the memory format of weights and images.
        init_from: a file of weights or a name of timm's that training from the start begins with, see
            `zoo.load_resnet`. Checkpoints carry it as a record: what they are loaded into does without it.
    """

    task: ClassVar[str]
    preprocessing_type: ClassVar[Any]
    net: Any

    def __init__(self, num_classes: int, channels_last: bool, init_from: str | None = None) -> None:
        super().__init__()
        self.num_classes = num_classes
        self._init_from = init_from  # until it has been done, or a checkpoint has made it superfluous
        self.classes = [str(index) for index in range(num_classes)]
        self.preprocessing: Any = None
        self._data_classes: list[str] | None = None
        self._begun_with: str | None = None  # the file of backbone_weights
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format

    @property
    def backbone(self) -> nn.Module:
        """The part of `net` that `init_from` fills."""
        net: nn.Module = self.net
        return net

    def setup(self, stage: str) -> None:
        """Takes class names and preprocessing from the data, and refuses data that do not fit the network.

        Raises:
            ValueError: the number of classes is another, or in_chans is not 3.
        """
        data = getattr(self.trainer, "datamodule", None)
        if data is not None and hasattr(data, "classes"):
            self.classes = self._data_classes = list(data.classes)
            self.preprocessing = getattr(data, "preprocessing", self.preprocessing)
            for name in ("model_kwargs", "backbone_kwargs"):
                channels = (self.hparams.get(name) or {}).get("in_chans", 3)
                if isinstance(data, TaskData) and channels != 3:
                    raise ValueError(
                        f"{name}.in_chans must be 3, or left out, got {channels}: images are read as RGB, grey ones "
                        "with three equal channels"
                    )
        found = len(self.classes)
        if found != self.num_classes:
            raise ValueError(f"num_classes of the model is {self.num_classes}, but the data have {found} classes")

    def on_fit_start(self) -> None:
        """Fills the backbone from `init_from`: only here it is certain that no checkpoint has been loaded."""
        if self._init_from is None:
            return
        try:
            report = load_resnet(self.backbone, self._init_from)
        except (OSError, ValueError) as error:
            raise ValueError(f"init_from: {error}") from error
        rank_zero_info(str(report))
        self._init_from = None

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds what `involution predict` needs besides the weights: task, class names and preprocessing."""
        preprocessing = self.preprocessing._asdict() if self.preprocessing else None
        checkpoint["involution"] = {
            "task": self.task,
            "classes": self.classes,
            "preprocessing": preprocessing,
            "backbone_weights": self._begun_with,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes them from there, unless the data have named theirs, which must then be the same classes."""
        self._init_from = None
        carried = checkpoint.get("involution")
        if carried is None:
            return
        self._begun_with = carried.get("backbone_weights")
        if self._data_classes is None:
            self.classes = carried["classes"]
            values = carried["preprocessing"]
            self.preprocessing = self.preprocessing_type(**values) if values else None
        elif self._data_classes != carried["classes"]:
            raise ValueError(_difference(carried["classes"], self._data_classes))

    def plain_norms(self) -> list[nn.Module]:
        """The batch norms that `--trainer.sync_batchnorm true` leaves alone."""
        return []

    def on_train_start(self) -> None:
        """Starts the clock of an epoch in whose midst a resumed run begins: of it, only the rest is timed."""
        self._started = time.perf_counter()

    def on_train_epoch_start(self) -> None:
        """Starts the epoch's clock."""
        self._started = time.perf_counter()

    def on_train_epoch_end(self) -> None:
        """Logs train/seconds."""
        self.log("train/seconds", time.perf_counter() - self._started)

    @cached_property
    def evaluation(self) -> Any:
        """The transform of an image that is no training image.

        Raises:
            ValueError: neither data nor checkpoint have named it.
        """
        if self.preprocessing is None:
            raise ValueError("preprocessing is missing in the checkpoint: it was not trained on data that name it")
        return self.preprocessing.evaluation()

    def diagnose(self, batch: Any) -> Diagnosis:
        """What the network's involutions do to a training batch, see `nn.diagnose`; nothing is logged or changed."""
        raise NotImplementedError

    def unlabelled(self, images: list[Tensor]) -> Any:
        """A training batch of images that nothing is known of, as `read` returns them: [3, H, W], all of a size."""
        raise NotImplementedError

    @property
    def read(self) -> Reader:
        """Reads an image file as the network wants it; loading processes get it without the network."""
        return Reader(self.evaluation)

    def configure_inference(self) -> None:
        """Sets how images are looked at in prediction: there is one way."""

    def load_backbone(self, body: nn.Module, file: Path) -> None:
        """Fills a backbone with a classifier's weights: see `zoo.checkpoints.load_backbone`."""
        left_out = load_backbone(body, file)
        rank_zero_info(f"backbone_weights: all of the backbone's, none missing; left out: {left_out or 'none'}")
        self._begun_with = str(file)
        self.hparams["backbone_weights"] = None  # what a checkpoint is loaded into has its weights from there

    def sgd(self, lr_scale: float) -> torch.optim.SGD:
        """Of all that is trained, with the lr, momentum and weight_decay of the hyperparameters."""
        given = self.hparams
        trained = [parameter for parameter in self.net.parameters() if parameter.requires_grad]
        return torch.optim.SGD(
            trained, lr=given["lr"] * lr_scale, momentum=given["momentum"], weight_decay=given["weight_decay"]
        )

    def scheduled(self, optimizer: torch.optim.Optimizer, factor: Callable[[int], float]) -> OptimizerLRSchedulerConfig:
        """What configure_optimizers returns: the learning rate times `factor` of the step, set at every batch."""
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def training_steps(self) -> int:
        """How many steps the optimizer makes in all; makes the loaders, which know the batches.

        Raises:
            ValueError: nobody knows.
        """
        steps = self.trainer.estimated_stepping_batches
        if steps == float("inf"):
            raise ValueError("max_epochs or max_steps must be given, for the learning rate's schedule, got neither")
        return int(steps)

    def lr_scale(self, lr_batch_size: int | None) -> float:
        """How many times as many images as `lr_batch_size` an optimizer step sees; 1 without it.

        Raises:
            ValueError: there is no data module that knows its batch size.
        """
        if not lr_batch_size:
            return 1.0
        trainer: Any = self.trainer
        if not hasattr(trainer.datamodule, "batch_size"):
            raise ValueError("lr_batch_size wants a data module with a batch_size, and there is none")
        images = trainer.datamodule.batch_size * trainer.world_size * trainer.accumulate_grad_batches
        return float(images / lr_batch_size)
