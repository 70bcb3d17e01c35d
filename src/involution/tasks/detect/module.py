"""Training and evaluating a detector."""

import json
from bisect import bisect_right
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from PIL import Image
from torch import Tensor, nn

from ... import zoo  # noqa: F401  (registers our models with timm)
from ...engine.data import IMAGENET_MEAN, IMAGENET_STD
from ...engine.module import TaskModule, linear_warmup
from ...engine.pictures import side_by_side
from ...nn import Diagnosis, diagnose
from .evaluation import KINDS, Detection, as_results, average_precision, detections, ground_truth
from .models import faster_rcnn, mask_rcnn, retinanet
from .predictions import DetectionWriter, drawn
from .preprocessing import Preprocessing
from .targets import Targets

MODELS = {"faster_rcnn": faster_rcnn, "mask_rcnn": mask_rcnn, "retinanet": retinanet}
Images = list[Tensor]
IN_CHECKPOINT = "in the checkpoint"  # value of backbone_weights after they have been loaded


def warmup_steps_down(
    step: int, warmup: int, warmup_ratio: float, milestones: Sequence[int], steps_per_epoch: int
) -> float:
    """The learning rate at a step as a factor of its peak: linear warm-up from `warmup_ratio`, x0.1 at milestones."""
    return linear_warmup(step, warmup, warmup_ratio) * 0.1 ** bisect_right(milestones, step / steps_per_epoch)


class Detector(TaskModule):
    """Faster R-CNN, Mask R-CNN or RetinaNet, trained with SGD, linear warm-up and step decay (the paper's 1x recipe).

    Batches are (images, targets) as in `COCO`. Logs every loss under train/ and the learning rate as lr at every step,
    and COCO's twelve numbers under val/ and test/, as box_AP, box_AP50, ..., mask_AP, ... (fractions of 1; -1 where
    there is no object of that size). Results in COCO's format are written to val.bbox.json and val.segm.json in the
    run's folder.

    A checkpoint carries the model's arguments, class names and preprocessing, for `involution predict`.

    Args:
        model_name: faster_rcnn, mask_rcnn or retinanet.
        num_classes: without background; `involution fit` sets it from the data.
        backbone: a RedNet or ResNet of timm's registry.
        neck: "convolution" or "involution", of the pyramid.
        head: "convolution" or "involution", of RPN and mask head; RetinaNet's is of convolutions.
        backbone_weights: a checkpoint of a classifier that `involution fit` trained, or a file of weights, of the same
            network as `backbone`. None trains from scratch; then nothing is frozen, whatever the next two arguments.
        frozen_stages: number of the backbone's stages that keep these weights, besides its stem.
        norm_eval: the backbone's batch norms keep the statistics of these weights.
        backbone_kwargs: further arguments of timm.create_model, such as stem_kernel_size.
        model_kwargs: further arguments of the detector, with torchvision's names, such as box_detections_per_img.
        lr: peak learning rate.
        lr_batch_size: images per optimizer step (of all processes and accumulated batches) for which `lr` and
            `warmup_steps` are given; for another number, lr scales with it and warmup_steps inversely. None: no
            scaling.
        momentum: of SGD.
        weight_decay: of all trained parameters.
        warmup_steps: optimizer steps of linear warm-up.
        warmup_ratio: the learning rate at the first step, as a fraction of `lr`.
        milestones: epochs after which the learning rate is multiplied by 0.1.
        channels_last: memory format of the weights; involution is fastest with it on CPU.
        init_from: weights that the backbone starts from as far as they fit, with nothing frozen: a checkpoint of a
            classifier, another file of weights, or a name whose pretrained weights timm downloads, such as resnet50.
            RedNet takes the weights of the ResNet of its depth, see `zoo.load_resnet`.

    Raises:
        FileNotFoundError: backbone_weights is no file.
        ValueError: an argument is not valid; or, when the trainer starts, the data have another number of classes or
            no masks.
    """

    preprocessing_type = Preprocessing

    def __init__(
        self,
        model_name: str,
        num_classes: int,
        backbone: str = "rednet50",
        neck: str = "convolution",
        head: str = "convolution",
        backbone_weights: str | None = None,
        frozen_stages: int = 1,
        norm_eval: bool = True,
        backbone_kwargs: dict[str, Any] | None = None,
        model_kwargs: dict[str, Any] | None = None,
        lr: float = 0.02,
        lr_batch_size: int | None = None,
        momentum: float = 0.9,
        weight_decay: float = 1e-4,
        warmup_steps: int = 0,
        warmup_ratio: float = 0.001,
        milestones: tuple[int, ...] = (),
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
        if model_name not in MODELS:
            raise ValueError(f"model_name must be one of {', '.join(MODELS)}, got {model_name!r}")
        options: dict[str, Any] = {"neck": neck, "head": head}
        if model_name == "retinanet":
            if head != "convolution":
                raise ValueError(f"head must be convolution for retinanet, got {head!r}")
            del options["head"]
        if backbone_weights is not None:
            options |= {"frozen_stages": frozen_stages, "norm_eval": norm_eval}
        # Training images are scaled by the data, in their loading processes.
        options |= {"backbone_kwargs": backbone_kwargs, "_skip_resize": True, **(model_kwargs or {})}
        build: Any = MODELS[model_name]
        self.net = build(backbone, num_classes=num_classes, **options).to(memory_format=self.memory_format)
        if backbone_weights not in (None, IN_CHECKPOINT):
            self.load_backbone(self.net.backbone.body, Path(backbone_weights))
            self.hparams["backbone_weights"] = IN_CHECKPOINT  # a resumed run freezes the same stages
        self.preprocessing = Preprocessing(800, 1333, IMAGENET_MEAN, IMAGENET_STD)
        self.kinds = ["box", "mask"] if model_name == "mask_rcnn" else ["box"]
        self._found: dict[int, list[Detection]] = {}

    @property
    def backbone(self) -> nn.Module:
        """timm's network, without the pyramid."""
        body: nn.Module = self.net.backbone.body
        return body

    def setup(self, stage: str) -> None:
        """Takes class names and preprocessing from the data, and refuses data without masks for a Mask R-CNN."""
        super().setup(stage)
        data = getattr(self.trainer, "datamodule", None)
        if "mask" in self.kinds and not getattr(data, "masks", True):
            raise ValueError("masks must be true in the data of a model that predicts masks, got false")

    @staticmethod
    def collate(images: Images) -> Images:
        """A list: sizes differ."""
        return images

    def forward(self, images: Images) -> list[dict[str, Tensor]]:
        """Images [3, H, W] in 0..1 -> for each, boxes [n, 4] in its pixels, labels [n] from 1, scores [n] and masks."""
        found: list[dict[str, Tensor]] = self._network()(images)
        return found

    def _network(self) -> Any:
        """The detector with the preprocessing of the data or the checkpoint."""
        transform, given = self.net.transform, self.preprocessing
        transform.min_size, transform.max_size = (given.min_size,), given.max_size
        transform.image_mean, transform.image_std = list(given.mean), list(given.std)
        return self.net

    def training_step(self, batch: tuple[Images, Targets], batch_idx: int) -> Tensor:
        """The sum of the detector's losses."""
        losses: dict[str, Tensor] = self._network()(*batch)
        loss = torch.stack(list(losses.values())).sum()
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch[0]))
        self.log_dict({f"train/{name.removeprefix('loss_')}": one for name, one in losses.items()})
        self.log("lr", self.trainer.optimizers[0].param_groups[0]["lr"])
        return loss

    def validation_step(self, batch: tuple[Images, Targets], batch_idx: int) -> None:
        """Collects the detections of the epoch."""
        for target, found in zip(batch[1], self._detections(batch[0]), strict=True):
            self._found[target["image_id"]] = found

    test_step = validation_step

    def on_validation_epoch_end(self) -> None:
        """Logs the twelve numbers under val/."""
        self._evaluate("val")

    def on_test_epoch_end(self) -> None:
        """Logs the twelve numbers under test/."""
        self._evaluate("test")

    def _evaluate(self, part: str) -> None:
        """The first process evaluates the detections of all processes, and broadcasts the numbers."""
        everything, self._found = self._gathered(), {}
        folder = Path(self.trainer.log_dir or self.trainer.default_root_dir)  # a collective: outside of the branch
        numbers: dict[str, float] = {}
        if self.trainer.is_global_zero:
            annotations = self.trainer.datamodule.split(part).annotations  # type: ignore[attr-defined]
            for kind in self.kinds:
                numbers |= self._of_kind(kind, part, annotations, everything, folder)
        self.log_dict(self.trainer.strategy.broadcast(numbers))

    def _gathered(self) -> dict[int, list[Detection]]:
        """The detections of all processes by image id; complete in the first process alone."""
        if self.trainer.world_size == 1:
            return self._found
        first = self.trainer.is_global_zero
        parts: list[Any] | None = [None] * self.trainer.world_size if first else None
        torch.distributed.gather_object(self._found, parts)
        return {image: found for part in parts or [] for image, found in part.items()}

    def _of_kind(self, kind: str, part: str, annotations: Any, everything: Any, folder: Path) -> dict[str, float]:
        """COCO's numbers of boxes or masks by the name that is logged; prints the summary and writes the results."""
        categories = list(annotations.categories)
        results = [one for image, found in everything.items() for one in as_results(image, found, categories, kind)]
        numbers, summary = average_precision(ground_truth(annotations), results, kind, everything)
        if self.prints_tables:
            print(f"{part}, {len(everything)} images, {KINDS[kind]}:", *summary, sep="\n")
        if not self.trainer.sanity_checking:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{part}.{KINDS[kind]}.json").write_text(json.dumps(results))
        return {f"{part}/{kind}_{name}": number for name, number in numbers.items()}

    def diagnose(self, batch: tuple[Images, list[dict[str, Tensor]]]) -> Diagnosis:
        """See `TaskModule.diagnose`."""
        return diagnose(self._network(), tuple(batch))

    def unlabelled(self, images: Images) -> tuple[Images, list[dict[str, Tensor]]]:
        """A batch of images without objects."""
        targets = []
        for image in images:
            nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long)}
            targets.append({**nothing, "masks": torch.zeros(0, *image.shape[1:], dtype=torch.uint8)})
        return images, targets

    def predict_step(self, images: Images, batch_idx: int) -> list[list[Detection]]:
        """The detections of every image, with masks as run lengths, which take little memory."""
        return self._detections(images)

    def illustrate(self, batch: tuple[Images, Targets], count: int) -> Image.Image:
        """Images with the detections of a score of at least 0.5, four at most: a detector is slow."""
        pictures = []
        images = batch[0][: min(4, count)]
        for image, found in zip(images, self._detections(images), strict=True):
            pixels = (255 * image.float().cpu()).round().byte()
            pictures.append(drawn(pixels, [one for one in found if one["score"] >= 0.5], self.classes))
        return side_by_side(pictures, 2)

    def _detections(self, images: Images) -> list[list[Detection]]:
        """One image at a time: in a batch, detections depend on the amount of padding."""
        return [detections(self([image])[0]) for image in images]

    def writer(self, folder: Path, files: Sequence[Path], score_threshold: float = 0.5) -> DetectionWriter:
        """Writes predictions.json in COCO's format, and a picture of every image with its detections.

        Args:
            folder: of the results.
            files: the images.
            score_threshold: minimum score of a detection in the pictures; predictions.json has all detections.
        """
        return DetectionWriter(folder, files, self.classes, score_threshold)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """SGD with the schedule stepped at every batch."""
        given = self.hparams
        scale = self.lr_scale(given["lr_batch_size"])
        steps = self.training_steps()
        batches = int(self.trainer.num_training_batches)
        factor = partial(
            warmup_steps_down,
            warmup=round(given["warmup_steps"] / scale),
            warmup_ratio=given["warmup_ratio"],
            milestones=given["milestones"],
            steps_per_epoch=max(1, min(steps, -(-batches // self.trainer.accumulate_grad_batches))),
        )
        return self.scheduled(self.sgd(scale), factor)
