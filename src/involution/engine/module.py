"""The base class of every task's Lightning module: what training, `involution predict` and `doctor` need of it."""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from PIL import Image
from torch import Tensor, nn

from ..nn import Diagnosis
from ..zoo.checkpoints import load_backbone
from ..zoo.warm_start import load_resnet
from .data import TaskData
from .finite_loss import FiniteLoss
from .images import read_image
from .writer import PredictionWriter

_NETWORK = ("model_name", "backbone", "neck", "head", "backbone_kwargs", "model_kwargs")  # define a network's weights


def _difference(theirs: Sequence[str], ours: Sequence[str]) -> str:
    """The error for a checkpoint whose classes are not those of the data."""
    for index, (one, other) in enumerate(zip(theirs, ours, strict=False)):
        if one != other:
            return f"the checkpoint's classes must be the data's, but class {index} is {one!r} there and {other!r} here"
    return f"the checkpoint's classes must be the data's, but they are {len(theirs)} there and {len(ours)} here"


@dataclass(frozen=True)
class Reader:
    """Turns image files into network inputs. Loader workers receive it alone, without the network.

    Args:
        transform: the preprocessing of one image.
    """

    transform: Callable[[Any], Any]

    def __call__(self, file: Path) -> Any:
        """The network's input for an image file.

        Raises:
            UnreadableImage: the file cannot be decoded.
        """
        return self.prepare(read_image(file))

    def prepare(self, image: Image.Image) -> Any:
        """The network's input for a decoded image."""
        return self.transform(image)


def linear_warmup(step: int, warmup: int, ratio: float) -> float:
    """Factor of the learning rate: grows linearly from `ratio` to 1 over `warmup` steps."""
    return ratio + (1 - ratio) * step / warmup if step < warmup else 1.0


class TaskModule(LightningModule, ABC):
    """A task: its network, losses and scores, and what `involution predict` and `involution doctor` need.

    A subclass sets `net`, the network, and `preprocessing_type`, saves a hyperparameter `model_name`, and implements
    the abstract methods below, `forward` and Lightning's steps. Class names and preprocessing come from the data module
    and are stored in checkpoints, beside the name of the subclass. The wall time of an epoch, including its validation,
    is logged as train/seconds.

    Args:
        num_classes: the number of classes that the network is built for.
        channels_last: memory format of weights and images.
        init_from: a weight file or a timm name that training from scratch starts from, see `zoo.load_resnet`. A
            checkpoint records it, but loading the checkpoint does not need it.
    """

    preprocessing_type: ClassVar[Any]  # a NamedTuple of plain values, see `data.Preprocessing`
    net: Any

    def __init__(self, num_classes: int, channels_last: bool, init_from: str | None = None) -> None:
        super().__init__()
        self.num_classes = num_classes
        self._init_from = init_from  # None once it is loaded, or once a checkpoint replaces it
        self.classes = [str(index) for index in range(num_classes)]
        self.preprocessing: Any = None  # of `preprocessing_type`, once data or a checkpoint define it
        self._data_classes: list[str] | None = None
        self._loaded: dict[str, Any] = {}  # the hyperparameters of a checkpoint that is being loaded
        self._backbone_file: str | None = None  # that backbone_weights named
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format

    def check_rates(self) -> None:
        """Checks the hyperparameters of optimizer and warm-up, which torch accepts below their minimum.

        Raises:
            ValueError: one is too small, or warmup_ratio is above 1.
        """
        minima = dict.fromkeys(("lr", "momentum", "weight_decay", "warmup_steps", "warmup_ratio"), 0)
        for name, minimum in {**minima, "lr_batch_size": 1}.items():
            value = self.hparams.get(name)
            if value is not None and value < minimum:
                raise ValueError(f"{name} must be at least {minimum}, got {value!r}")
        if self.hparams["warmup_ratio"] > 1:
            raise ValueError(f"warmup_ratio must be at most 1, got {self.hparams['warmup_ratio']!r}")

    @staticmethod
    @abstractmethod
    def collate(images: list[Any]) -> Any:
        """A batch for `predict_step` of what `read` returned for several files."""

    @abstractmethod
    def predict_step(self, images: Any, batch_idx: int) -> Any:
        """One output per image of the batch, in its order."""

    @abstractmethod
    def writer(self, folder: Path, files: Sequence[Path]) -> PredictionWriter:
        """The object that writes predictions to `folder`; further arguments become options of `involution predict`."""

    @abstractmethod
    def diagnose(self, batch: Any) -> Diagnosis:
        """Statistics of the network's involutions on a training batch, see `nn.diagnose`; nothing is changed."""

    @abstractmethod
    def unlabelled(self, images: list[Tensor]) -> Any:
        """A training batch of preprocessed images [3, H, W] of equal size, with placeholder labels."""

    def illustrate(self, batch: Any, count: int) -> Image.Image | None:
        """A picture of the predictions for the first images of a validation batch, or None.

        Args:
            batch: with labels.
            count: of images, at most.
        """
        return None

    def pixels(self, image: Tensor) -> Tensor:
        """A normalised image [3, H, W] as uint8 pixels on the CPU."""
        given = self.preprocessing
        mean, std = (torch.tensor(values)[:, None, None] for values in (given.mean, given.std))
        return (255 * (image.float().cpu() * std + mean)).round().clamp(0, 255).byte()

    def configure_inference(self) -> None:
        """Sets how `predict_step` runs the network; arguments of a subclass become options of `involution predict`."""

    @property
    def read(self) -> Reader:
        """Turns an image file into the network's input."""
        return Reader(self.evaluation)

    @cached_property
    def evaluation(self) -> Callable[[Any], Any]:
        """The preprocessing of images that are not trained on.

        Raises:
            ValueError: neither data nor checkpoint define it.
        """
        if self.preprocessing is None:
            raise ValueError("preprocessing is missing in the checkpoint: it was not trained on data that define it")
        transform: Callable[[Any], Any] = self.preprocessing.evaluation()
        return transform

    @property
    def backbone(self) -> nn.Module:
        """The part of `net` that `init_from` fills."""
        net: nn.Module = self.net
        return net

    @property
    def prints_tables(self) -> bool:
        """Whether evaluation prints all scores; in training only with a progress bar, else an epoch is one line."""
        trainer = self.trainer
        fitting = trainer.state.fn == TrainerFn.FITTING
        return not trainer.sanity_checking and (not fitting or trainer.progress_bar_callback is not None)

    def plain_norms(self) -> list[nn.Module]:
        """The batch norms that `--trainer.sync_batchnorm true` leaves unchanged."""
        return []

    def setup(self, stage: str) -> None:
        """Takes class names and preprocessing from the data, and refuses data that do not fit the network.

        Raises:
            ValueError: the number of classes differs, or in_chans is not 3.
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
        """Loads `init_from`: only here it is certain that no checkpoint was loaded."""
        if self._init_from is None:
            return
        try:
            report = load_resnet(self.backbone, self._init_from)
        except (OSError, ValueError) as error:
            raise ValueError(f"init_from: {error}") from error
        rank_zero_info(str(report))
        self._init_from = None

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds what `involution predict` needs besides the weights: module class, class names and preprocessing."""
        if self._trainer is not None and "callbacks" not in checkpoint:  # Lightning skips the callbacks' own hook
            for callback in (one for one in self.trainer.callbacks if isinstance(one, FiniteLoss)):  # type: ignore[attr-defined]
                callback.on_save_checkpoint(self.trainer, self, checkpoint)
        checkpoint["involution"] = {
            "module": f"{type(self).__module__}.{type(self).__qualname__}",
            "classes": self.classes,
            "preprocessing": self.preprocessing._asdict() if self.preprocessing else None,
            "backbone_weights": self._backbone_file,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restores them, unless a data module defines its own.

        Raises:
            ValueError: the data module's classes are not the checkpoint's.
        """
        self._init_from = None
        self._loaded = dict(checkpoint.get("hyper_parameters", {}))
        stored = checkpoint.get("involution")
        if stored is None:
            return
        self._backbone_file = stored.get("backbone_weights")
        if self._data_classes is None:
            self.classes = stored["classes"]
            values = stored["preprocessing"]
            self.preprocessing = self.preprocessing_type(**values) if values else None
        elif self._data_classes != stored["classes"]:
            raise ValueError(_difference(stored["classes"], self._data_classes))

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Fills the module.

        Raises:
            ValueError: the weights do not fit, because the checkpoint's network has other options.
            RuntimeError: they do not fit for another reason.
        """
        try:
            return super().load_state_dict(state_dict, strict, assign)
        except RuntimeError as error:
            pairs = {
                name: (self.hparams.get(name), self._loaded.get(name)) for name in _NETWORK if name in self.hparams
            }
            other = [
                f"model.{name} {theirs!r}, got {ours!r}" for name, (ours, theirs) in pairs.items() if ours != theirs
            ]
            if not other or not self._loaded:
                raise
            raise ValueError(
                f"the network must be the checkpoint's, with {'; '.join(other)}; to start another network from these "
                "weights, give model.init_from and no ckpt_path"
            ) from error

    def on_train_start(self) -> None:
        """Starts the clock: an epoch that a run resumes in the middle of is timed from here."""
        self._started = time.perf_counter()

    def on_train_epoch_start(self) -> None:
        """Starts the epoch's clock."""
        self._started = time.perf_counter()

    def on_train_epoch_end(self) -> None:
        """Logs train/seconds."""
        self.log("train/seconds", time.perf_counter() - self._started)

    def load_backbone(self, body: nn.Module, file: Path) -> None:
        """Fills a backbone with a classifier's weights: see `zoo.checkpoints.load_backbone`."""
        left_out = load_backbone(body, file, self.hparams["backbone"])
        rank_zero_info(f"backbone_weights: loaded every tensor of the backbone; ignored: {left_out or 'none'}")
        self._backbone_file = str(file)
        self.hparams["backbone_weights"] = None  # loading a checkpoint needs no such file

    def sgd(self, lr_scale: float) -> torch.optim.SGD:
        """SGD over all trainable parameters, with lr, momentum and weight_decay from the hyperparameters."""
        given = self.hparams
        trained = [parameter for parameter in self.net.parameters() if parameter.requires_grad]
        return torch.optim.SGD(
            trained, lr=given["lr"] * lr_scale, momentum=given["momentum"], weight_decay=given["weight_decay"]
        )

    def scheduled(self, optimizer: torch.optim.Optimizer, factor: Callable[[int], float]) -> OptimizerLRSchedulerConfig:
        """The result of configure_optimizers: at every step the learning rate is multiplied by `factor(step)`."""
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def training_steps(self) -> int:
        """The number of optimizer steps of the whole run; builds the loaders to count batches.

        Raises:
            ValueError: neither max_epochs nor max_steps is given.
        """
        steps = self.trainer.estimated_stepping_batches
        if steps == float("inf"):
            raise ValueError("max_epochs or max_steps must be given, for the learning rate's schedule, got neither")
        return int(steps)

    def lr_scale(self, lr_batch_size: int | None) -> float:
        """The images of an optimizer step divided by `lr_batch_size`; 1 without it.

        Raises:
            ValueError: the data module has no batch_size.
        """
        if not lr_batch_size:
            return 1.0
        trainer: Any = self.trainer
        if not hasattr(trainer.datamodule, "batch_size"):
            raise ValueError("lr_batch_size must come with a data module that has a batch_size, got one without")
        images = trainer.datamodule.batch_size * trainer.world_size * trainer.accumulate_grad_batches
        return float(images / lr_batch_size)
