"""The paper's tables of parameters and multiply-adds: every row as printed, and as counted here."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import timm
import torch
from torch import nn

from .. import zoo
from ..engine.sync_batch_norm import norms_of_involutions, synchronised
from ..tasks.detect import faster_rcnn, mask_rcnn, retinanet
from ..tasks.segment import SemanticFPN, UPerNet
from .count import Cost, cost
from .detectors import CountedRCNN, CountedRetinaNet

assert zoo  # importing it registers RedNet
_IMAGE = (3, 224, 224)
_INV = "involution"


class Row(NamedTuple):
    """One row: its name and the printed values, in millions of parameters and billions of multiply-adds.

    The printed values are not all of the released models: `counted` makes the model that they fit, without the
    multiply-adds (but with the parameters) of the modules in `left_out`; `model` makes the released one.
    """

    name: str
    printed: tuple[float, float] | None
    model: Callable[[], nn.Module]
    counted: Callable[[], nn.Module]
    left_out: tuple[str, ...] = ()
    input_size: tuple[int, int, int] = _IMAGE


class Counted(NamedTuple):
    """A row's figures under every counting convention."""

    row: str
    params_trainable: int
    counted: int
    total: int
    mac: int


def _rednet(depth: int, millions: float, billions: float) -> Row:
    """Printed values: with a 7x7 stem, without the classifier; the released code has a 3x3 stem."""
    name = f"rednet{depth}"
    return Row(
        f"RedNet-{depth}",
        (millions, billions),
        lambda: timm.create_model(name),
        lambda: timm.create_model(name, stem_kernel_size=7),
        left_out=("fc",),
    )


def _resnet(depth: int, name: str) -> Row:
    model = partial(timm.create_model, name)
    return Row(f"ResNet-{depth}", None, model, model)


_MASK_TAIL = tuple(f"detector.roi_heads.mask_predictor.{part}" for part in ("conv5_mask", "mask_fcn_logits"))


def _detector(
    name: str,
    printed: tuple[float, float] | None,
    make: Callable[..., nn.Module],
    stem: int = 7,
    left_out: tuple[str, ...] = (),
    **options: Any,
) -> Row:
    """At 1280x800, stem and first stage frozen. Printed values: kernel size `stem` in the stem; released code: 7."""

    def model(stem_kernel_size: int) -> nn.Module:
        rednet = options.get("backbone", "rednet50").startswith("rednet")
        backbone = {"stem_kernel_size": stem_kernel_size} if rednet else {}
        detector = make(frozen_stages=1, backbone_kwargs=backbone, **options)
        return CountedRetinaNet(detector) if make is retinanet else CountedRCNN(detector)

    released = partial(model, 7)
    counted = released if stem == 7 else partial(model, stem)
    return Row(name, printed, released, counted, left_out, (3, 1280, 800))


def _segmenter(
    name: str, printed: tuple[float, float] | None, make: Callable[..., nn.Module], backbone: str, **options: Any
) -> Row:
    """At 2048x1024, with synchronised batch norms except in involutions."""

    def model() -> nn.Module:
        stem = {"stem_kernel_size": 7} if backbone.startswith("rednet") else {}
        network = make(backbone, backbone_kwargs=stem, **options)
        return synchronised(network, norms_of_involutions(network))

    return Row(name, printed, model, model, input_size=(3, 2048, 1024))


ROWS = (
    _rednet(26, 9.23, 1.73),
    _rednet(38, 12.39, 2.22),
    _rednet(50, 15.54, 2.71),
    _rednet(101, 25.65, 4.74),
    _rednet(152, 33.99, 6.79),
    _resnet(26, "resnet26_paper"),
    _resnet(38, "resnet38_paper"),
    _resnet(50, "resnet50"),
    _resnet(101, "resnet101"),
    _resnet(152, "resnet152"),
    _detector("Faster R-CNN, conv neck, conv head", (31.6, 177.9), faster_rcnn, stem=3),
    _detector("Faster R-CNN, inv neck, conv head", (29.5, 135.0), faster_rcnn, neck=_INV),
    _detector("Faster R-CNN, inv neck, inv head", (29.0, 91.5), faster_rcnn, neck=_INV, head=_INV),
    _detector("Mask R-CNN, conv, conv", (34.2, 224.2), mask_rcnn, stem=3, left_out=_MASK_TAIL),
    _detector("Mask R-CNN, inv, conv", (32.2, 181.3), mask_rcnn, left_out=_MASK_TAIL, neck=_INV),
    _detector("Mask R-CNN, inv, inv", (29.5, 104.6), mask_rcnn, neck=_INV, head=_INV),
    _detector("RetinaNet, conv neck", (27.8, 210.1), retinanet, stem=3),
    _detector("RetinaNet, inv neck", (26.3, 199.9), retinanet, neck=_INV),
    _segmenter("Semantic FPN, conv neck", (18.5, 293.9), SemanticFPN, "rednet50"),
    _segmenter("Semantic FPN, inv neck", (16.4, 205.2), SemanticFPN, "rednet50", neck=_INV),
    _segmenter("UPerNet", (56.4, 1825.6), UPerNet, "rednet50"),
    _detector("Faster R-CNN R50", None, faster_rcnn, backbone="resnet50"),
    _detector("Mask R-CNN R50", None, mask_rcnn, left_out=_MASK_TAIL, backbone="resnet50"),
    _detector("RetinaNet R50", None, retinanet, backbone="resnet50"),
    _segmenter("Semantic FPN R50", None, SemanticFPN, "resnet50c"),
    _segmenter("UPerNet R50", None, UPerNet, "resnet50c"),
)


@cache
def count_row(row: Row) -> Counted:
    """Counts one row, once."""
    with torch.device("meta"):  # initialising weights would take longer than counting
        paper = cost(row.counted(), row.input_size)
        released = paper if row.counted is row.model else cost(row.model(), row.input_size)
    counted = sum(o.multiply_adds + o.others for o in paper.operations if o.module not in row.left_out)
    return Counted(row.name, paper.trainable, counted, released.total, released.multiply_adds)


def disagreement(row: Row, counted: Counted) -> str:
    """How the printed figures differ from the released code's; empty if they do not."""
    if row.printed is None:
        return ""
    reasons = []
    digits = 2 if row.input_size == _IMAGE else 1  # printed in the paper
    millions, billions = round(counted.params_trainable / 1e6, digits), round(counted.counted / 1e9, digits)
    if (millions, billions) != row.printed:
        reasons.append(f"its own rules give {millions} M, {billions} G")
    differs = [f"without {', '.join(part.rpartition('.')[2] for part in row.left_out)}"] if row.left_out else []
    if row.counted is not row.model:
        differs.append("with another stem than the released code's")
    if differs:
        reasons.append(f"printed {' and '.join(differs)}: {counted.total / 1e9:.3f} G")
    return "; ".join(reasons)


def cost_of(name: str, input_size: tuple[int, int, int] | None = None) -> tuple[Cost, tuple[int, int, int]]:
    """The cost of a network in timm's registry, at its default input size or another.

    Raises:
        ValueError: timm does not know the name.
    """
    if not timm.is_model(name):
        raise ValueError(f"model must be a name that timm.create_model takes or a row of --published, got {name!r}")
    model = timm.create_model(name)
    size = input_size or tuple(model.default_cfg["input_size"])
    return cost(model, size), size
