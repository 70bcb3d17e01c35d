"""Training and evaluation of a segmenter."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassConfusionMatrix

from ... import zoo  # noqa: F401  (registers our models with timm)
from ...engine.module import Reader, TaskModule, linear_warmup
from ...engine.pictures import Colour, colour, side_by_side
from ...engine.sync_batch_norm import SyncBatchNorm, norms_of_involutions
from ...nn import Diagnosis, diagnose
from .evaluation import scores, table
from .inference import Inference
from .models import SemanticFPN, UPerNet
from .predictions import MaskWriter, overlay
from .preprocessing import IGNORED, Preprocessing, height_and_width

MODELS = {"semantic_fpn": SemanticFPN, "upernet": UPerNet}
Batch = tuple[list[Tensor], list[Tensor]]


def warmup_poly(step: int, total: int, warmup: int, warmup_ratio: float, power: float, floor: float = 0.0) -> float:
    """Factor of the peak learning rate at a step: linear warm-up times (1 - step / total)**power.

    With a floor, the decay ends there instead of at 0.
    """
    decay = (1 - min(1.0, step / max(1, total))) ** power
    return linear_warmup(step, warmup, warmup_ratio) * (floor + (1 - floor) * decay)


def _pair(size: tuple[int, int] | int | None) -> tuple[int, int] | None:
    return None if size is None else height_and_width(size)


def pixel_loss(logits: Tensor, masks: Tensor, over: str = "known") -> Tensor:
    """Mean cross entropy of pixels, in float32; 0 if all are ignored.

    Args:
        logits: [N, C, H, W].
        masks: [N, H, W] int64, of classes or `IGNORED`.
        over: "known" averages over pixels that are not ignored, "all" over all pixels, with 0 for ignored ones.
    """
    total = F.cross_entropy(logits.float(), masks, ignore_index=IGNORED, reduction="sum")
    return total / (masks.numel() if over == "all" else (masks != IGNORED).sum().clamp(min=1))


SizedImage = tuple[Tensor, tuple[int, int]]  # the network's input, and height and width of the file's image


class SizedReader(Reader):
    """A `Reader` that also returns the image's own height and width."""

    def prepare(self, image: Image.Image) -> SizedImage:
        """See `Reader`."""
        return self.transform(image), (image.height, image.width)


class Segmenter(TaskModule):
    """Semantic FPN or UPerNet, trained with SGD and polynomial decay (the paper's recipe).

    Batches are `SegmentationData`'s (images, masks). Logs train/loss and the learning rate as lr, and under val/ and
    test/ mIoU, mean_accuracy (over classes), pixel_accuracy and IoU_NAME of each class (fractions of 1), from all
    pixels of all images together; train/seconds is the wall time of an epoch.

    A checkpoint stores the model's arguments, class names, palette and preprocessing, for `involution predict`.

    Args:
        model_name: semantic_fpn or upernet.
        num_classes: `involution fit` takes it from the data.
        backbone: a RedNet or ResNet of timm's registry.
        neck: "convolution" or "involution", in semantic FPN's pyramid; UPerNet has convolutions.
        backbone_weights: a classifier's checkpoint from `involution fit`, or a weight file. None starts from scratch.
        backbone_kwargs: further arguments of timm.create_model, such as stem_kernel_size.
        model_kwargs: further arguments of the model, such as channels.
        auxiliary_weight: of the loss of UPerNet's auxiliary head.
        loss_over: the loss averages over the "known" pixels, or over "all" with 0 for ignored ones: then, as
            published, a mostly ignored crop counts less.
        lr: peak learning rate.
        lr_batch_size: images per optimizer step (over all processes and accumulated batches) that `lr` and
            `warmup_steps` are meant for; with other batches lr scales in proportion, warmup_steps inversely. None
            scales nothing.
        momentum: of SGD.
        weight_decay: of all trained parameters, norms and biases included, as in the published systems.
        warmup_steps: optimizer steps of linear warm-up.
        warmup_ratio: the learning rate at the first step, as a fraction of `lr`.
        power: of the polynomial decay.
        min_lr: the final learning rate for a peak of `lr`; scaled with it.
        window: height and width of the sliding window of evaluation and prediction, or one number for a square; None
            runs the network on the whole image.
        window_stride: its step; None is `window`.
        scales: of the image in evaluation and prediction; probabilities are averaged.
        flip: also average over the mirrored image.
        channels_last: memory format of weights and images; involution is fastest with it on CPU.
        init_from: weights that the backbone starts training from, as far as they fit: a classifier's checkpoint,
            another weight file, or a name whose pretrained weights timm downloads, such as resnet50. RedNet accepts
            those of a ResNet of its depth, see `zoo.load_resnet`.

    Raises:
        FileNotFoundError: backbone_weights is no file.
        ValueError: an argument does not fit; the number of classes of the data differs (once the trainer starts).
    """

    preprocessing_type = Preprocessing

    def __init__(
        self,
        model_name: str,
        num_classes: int,
        backbone: str = "rednet50",
        neck: str = "convolution",
        backbone_weights: str | None = None,
        backbone_kwargs: dict[str, Any] | None = None,
        model_kwargs: dict[str, Any] | None = None,
        auxiliary_weight: float = 0.4,
        loss_over: str = "known",
        lr: float = 0.01,
        lr_batch_size: int | None = None,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        warmup_steps: int = 0,
        warmup_ratio: float = 0.001,
        power: float = 0.9,
        min_lr: float = 0.0,
        window: tuple[int, int] | int | None = None,
        window_stride: tuple[int, int] | int | None = None,
        scales: tuple[float, ...] = (1.0,),
        flip: bool = False,
        channels_last: bool = True,
        init_from: str | None = None,
    ) -> None:
        super().__init__(num_classes, channels_last, init_from)
        self.save_hyperparameters()
        self.check_rates()
        if init_from is not None and backbone_weights is not None:
            raise ValueError(
                f"init_from and backbone_weights exclude each other, got {init_from!r} and {backbone_weights!r}"
            )
        if num_classes < 2:
            raise ValueError(f"num_classes must be at least 2, the background being a class, got {num_classes!r}")
        if model_name not in MODELS:
            raise ValueError(f"model_name must be one of {', '.join(MODELS)}, got {model_name!r}")
        options: dict[str, Any] = {"neck": neck}
        if model_name == "upernet":
            if neck != "convolution":
                raise ValueError(f"neck must be convolution for upernet, got {neck!r}")
            del options["neck"]
        if loss_over not in ("known", "all"):
            raise ValueError(f"loss_over must be known or all, got {loss_over!r}")
        if not 0 <= min_lr <= lr:
            raise ValueError(f"min_lr must be from 0 to lr, which is {lr}, got {min_lr!r}")
        self.inference = Inference(_pair(window), _pair(window_stride), tuple(scales), flip)
        self.inference.check()
        build: Any = MODELS[model_name]
        net = build(
            backbone, num_classes=num_classes, **options, backbone_kwargs=backbone_kwargs, **(model_kwargs or {})
        )
        self.net: nn.Module = net.to(memory_format=self.memory_format)
        if backbone_weights is not None:
            self.load_backbone(net.body, Path(backbone_weights))
        self.palette: list[Colour] = [colour(index) for index in range(1, num_classes + 1)]
        self.train_loss = MeanMetric()
        # Without validation, which takes longer than counting: masks are checked when they are read.
        self.confusion = MulticlassConfusionMatrix(num_classes, ignore_index=IGNORED, validate_args=False)

    def plain_norms(self) -> list[nn.Module]:
        """The norms of involutions, as published."""
        return norms_of_involutions(self.net)

    @property
    def backbone(self) -> nn.Module:
        """timm's network."""
        body: Any = self.net.body
        return body

    def setup(self, stage: str) -> None:
        """Takes class names, palette and preprocessing from the data."""
        super().setup(stage)
        data = getattr(self.trainer, "datamodule", None)
        self.palette = list(getattr(data, "palette", self.palette))

    def on_train_start(self) -> None:
        """Refuses single images whose features are a pixel, which has no batch statistics."""
        super().on_train_start()
        data = getattr(self.trainer, "datamodule", None)
        if getattr(data, "batch_size", 2) > 1:
            return
        if self.hparams["model_name"] == "upernet" and self._averages_over_a_process(self.net.pooling):
            raise ValueError("batch_size must be at least 2 for upernet, which pools images to a pixel each, got 1")
        features: Any = self.backbone
        stride = features.feature_info.reduction()[-1]
        if max(getattr(data, "crop", (stride + 1,))) <= stride and self._averages_over_a_process(self.net):
            raise ValueError(
                f"batch_size must be at least 2, or crop larger than {stride} pixels, because batch norms at the last "
                f"stage's stride have one value per channel otherwise, got 1 and {data.crop}"  # type: ignore[union-attr]
            )

    def _averages_over_a_process(self, part: Any) -> bool:
        """Whether a part of the network has batch norms over the images of one process, backbone or decoder."""
        norms = [module for module in part.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
        shared = self.trainer.world_size > 1
        return not all(shared and isinstance(norm, SyncBatchNorm | nn.SyncBatchNorm) for norm in norms)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the palette to what every task stores."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["involution"]["palette"] = self.palette

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restores the palette, unless a data module defines one."""
        super().on_load_checkpoint(checkpoint)
        if self._data_classes is None and "involution" in checkpoint:
            self.palette = checkpoint["involution"]["palette"]

    @staticmethod
    def collate(images: list[SizedImage]) -> list[SizedImage]:
        """A list: sizes differ."""
        return images

    def forward(self, images: Tensor) -> Tensor:
        """[N, 3, H, W] -> logits [N, num_classes, H, W]."""
        logits: Tensor = self.net(images.to(memory_format=self.memory_format))["out"]
        return logits

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The mean loss over the batch's pixels, the auxiliary head's included."""
        images, masks = torch.stack(batch[0]), torch.stack(batch[1]).long()
        loss = self._loss(self.net(images.to(memory_format=self.memory_format)), masks)
        self.train_loss.update(loss.detach())
        self.log("train/loss", self.train_loss, prog_bar=True, on_step=False, on_epoch=True, batch_size=len(images))
        self.log("lr", self.trainer.optimizers[0].param_groups[0]["lr"])
        return loss

    def _loss(self, logits: dict[str, Tensor], masks: Tensor) -> Tensor:
        over = self.hparams["loss_over"]
        loss = pixel_loss(logits["out"], masks, over)
        if "aux" in logits:
            loss = loss + self.hparams["auxiliary_weight"] * pixel_loss(logits["aux"], masks, over)
        return loss

    def diagnose(self, batch: Batch) -> Diagnosis:
        """Statistics of the network's involutions on a training batch."""
        images, masks = torch.stack(batch[0]), torch.stack(batch[1]).long()
        return diagnose(self.net, images.to(memory_format=self.memory_format), partial(self._loss, masks=masks))

    def unlabelled(self, images: list[Tensor]) -> Batch:
        """A batch whose pixels are all of class 0."""
        return images, [torch.zeros(image.shape[1:], dtype=torch.uint8) for image in images]

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Counts pixels."""
        for image, mask in zip(*batch, strict=True):
            self.confusion.update(self._classes(image, (mask.shape[0], mask.shape[1])), mask.long())

    def illustrate(self, batch: Batch, count: int) -> Image.Image:
        """Predicted classes over the images at the network's size, and the masks beside them; four images at most."""
        pictures = []
        for image, mask in zip(*(part[: min(4, count)] for part in batch), strict=True):
            size = image.shape[-2:]
            found = self._classes(image, (size[0], size[1])).byte().cpu()
            wanted = F.interpolate(mask[None, None].float().cpu(), size, mode="nearest")[0, 0].byte()
            for one in (found, torch.where(wanted == IGNORED, found, wanted)):
                pictures.append(overlay(self.pixels(image), one, self.classes, self.palette, 0.5))
        return side_by_side(pictures, 2)

    test_step = validation_step

    def on_validation_epoch_end(self) -> None:
        """Logs the scores under val/."""
        self._evaluate("val")

    def on_test_epoch_end(self) -> None:
        """Logs the scores under test/."""
        self._evaluate("test")

    def _evaluate(self, part: str) -> None:
        found = scores(self.confusion.compute(), self.classes)
        self.confusion.reset()
        if self.prints_tables:
            rank_zero_info(f"{part}, percent:\n{table(found)}")
        self.log_dict({f"{part}/{name}": value for name, value in found.items()})

    def _classes(self, image: Tensor, size: tuple[int, int]) -> Tensor:
        """[3, h, w] -> the most probable class of each pixel of the file's image, [*size] int64."""
        return self.inference.probabilities(self, image, size).argmax(0)

    @property
    def read(self) -> Reader:
        """Turns an image file into the network's input, [3, h, w], and returns the file's height and width."""
        return SizedReader(self.evaluation)

    def predict_step(self, images: list[SizedImage], batch_idx: int) -> list[Tensor]:
        """The classes of each image's pixels: [H, W] uint8."""
        return [self._classes(image, size).byte().cpu() for image, size in images]

    def configure_inference(
        self,
        window: tuple[int, int] | int | None = None,
        window_stride: tuple[int, int] | int | None = None,
        scales: tuple[float, ...] | None = None,
        flip: bool | None = None,
    ) -> None:
        """Sets the inference settings of prediction.

        Args:
            window: height and width of the sliding window; None keeps training's, with its stride.
            window_stride: the window's step; None keeps training's or, with another window, is `window`.
            scales: of the image; probabilities are averaged. None keeps training's.
            flip: also average over the mirrored image; None keeps training's.

        Raises:
            ValueError: a value does not fit.
        """
        before = self.inference
        self.inference = Inference(
            before.window if window is None else _pair(window),
            _pair(window_stride) or (before.stride if window is None else None),
            before.scales if scales is None else tuple(scales),
            before.flip if flip is None else flip,
        )
        self.inference.check()

    def writer(self, folder: Path, files: Sequence[Path], alpha: float = 0.5) -> MaskWriter:
        """Writes per image STEM.png, the image with its classes' colours and a legend, and ids/STEM.png, class indices.

        Args:
            folder: the folder for the results.
            files: the images.
            alpha: opacity of the colours.
        """
        return MaskWriter(folder, files, self.classes, self.palette, alpha)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """SGD, with the schedule applied at every step."""
        given = self.hparams
        scale = self.lr_scale(given["lr_batch_size"])
        factor = partial(
            warmup_poly,
            total=self.training_steps(),
            warmup=round(given["warmup_steps"] / scale),
            warmup_ratio=given["warmup_ratio"],
            power=given["power"],
            floor=given["min_lr"] / given["lr"] if given["min_lr"] else 0.0,
        )
        return self.scheduled(self.sgd(scale), factor)
