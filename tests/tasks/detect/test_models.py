"""Faster R-CNN, Mask R-CNN and RetinaNet with RedNet, and involution in neck and head."""

from typing import Any

import pytest
import torch
from small_detectors import FEW, NARROW, SMALL
from torch import nn

from involution.nn import Involution2d
from involution.tasks.detect import faster_rcnn, mask_rcnn, retinanet
from involution.tasks.detect.rcnn import BoxPredictor, MaskPredictor

OPTIONS: dict[str, Any] = SMALL | {"num_classes": 3}
FAMILIES = [faster_rcnn, mask_rcnn, retinanet]


def targets(masks: bool) -> list[dict[str, torch.Tensor]]:
    boxes = torch.tensor([[8.0, 8.0, 40.0, 48.0], [30.0, 20.0, 60.0, 60.0]])
    target = {"boxes": boxes, "labels": torch.tensor([1, 3])}
    if masks:
        shapes = torch.zeros(2, 64, 80, dtype=torch.uint8)
        for shape, (left, top, right, bottom) in zip(shapes, boxes.int().tolist(), strict=True):
            shape[top:bottom, left:right] = 1
        target["masks"] = shapes
    return [target, {name: value[:0] for name, value in target.items()}]  # the second image has no objects


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layer", ["convolution", "involution"])
def test_training_reaches_every_parameter(family: Any, layer: str) -> None:
    torch.manual_seed(0)
    more = {} if family is retinanet else {"head": layer, **FEW}
    model = family(neck=layer, **more, **OPTIONS).train()
    images = [torch.rand(3, 64, 80), torch.rand(3, 70, 64)]
    losses = model(images, targets(family is mask_rcnn))
    assert all(loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    # A gradient may be zero: the last norm of a block starts at zero, and so does the gradient before it.
    unreached = {name for name, p in model.named_parameters() if p.grad is None}
    assert unreached == set()
    replaced = [name for name, module in model.named_modules() if isinstance(module, Involution2d)]
    in_pyramid = [name for name in replaced if "fpn" in name]
    assert len(in_pyramid) == (0 if layer == "convolution" else 3 if family is retinanet else 4)
    in_heads = [name for name in replaced if "rpn" in name or "roi_heads" in name]
    assert len(in_heads) == (0 if layer == "convolution" else {faster_rcnn: 1, mask_rcnn: 5, retinanet: 0}[family])
    assert all(m.kernel_size == (7, 7) for n, m in model.named_modules() if n in [*in_pyramid, *in_heads])


@pytest.mark.parametrize("family", FAMILIES)
def test_detections_have_labels_from_one(family: Any) -> None:
    torch.manual_seed(0)
    more = {"score_thresh": 0.0} if family is retinanet else {"box_score_thresh": 0.0, **FEW}
    model = family(**OPTIONS, **more).eval()
    with torch.no_grad():
        found, _ = model([torch.rand(3, 64, 80), torch.rand(3, 70, 64)])
    assert len(found["boxes"]) > 0
    assert found["labels"].min() >= 1
    assert found["labels"].max() <= 3
    assert ("masks" in found) == (family is mask_rcnn)
    if family is mask_rcnn:
        assert found["masks"].shape[1:] == (1, 64, 80)


def test_retinanets_labels_count_from_one() -> None:
    """Inside they count from 0: label 3 is the last of three scores."""
    model = retinanet(**OPTIONS).train()
    seen = {}
    original = model.compute_loss

    def compute_loss(targets: Any, *rest: Any) -> Any:
        seen["labels"] = [target["labels"].tolist() for target in targets]
        return original(targets, *rest)

    model.compute_loss = compute_loss  # type: ignore[method-assign]
    given = targets(False)
    model([torch.rand(3, 64, 80), torch.rand(3, 70, 64)], given)
    assert seen["labels"] == [[0, 2], []]
    assert given[0]["labels"].tolist() == [1, 3]  # the caller's targets stay unchanged


def test_group_norms_in_retinanets_head() -> None:
    def norms(**options: Any) -> list[int]:
        found = [m for m in retinanet(**OPTIONS, **options).head.modules() if isinstance(m, nn.GroupNorm)]
        return [norm.num_groups for norm in found]

    assert norms() == []
    assert norms(head_norm_groups=32) == [32] * 8


def test_predictors_pad_a_background_of_zeros() -> None:
    boxes, masks = BoxPredictor(8, 3), MaskPredictor(8, 8, 3)
    scores, deltas = boxes(torch.randn(5, 8))
    assert (scores.shape, deltas.shape) == ((5, 4), (5, 16))
    assert boxes.bbox_pred.out_features == 12
    assert not deltas[:, :4].any()
    assert deltas[:, 4:].all()
    logits = masks(torch.randn(5, 8, 14, 14))
    assert logits.shape == (5, 4, 28, 28)
    assert not logits[:, 0].any()


def test_frozen_stages_and_norms() -> None:
    batch_norms = OPTIONS | {"backbone_kwargs": NARROW | {"norm_layer": "batchnorm2d"}}
    model = faster_rcnn(**batch_norms, frozen_stages=2, norm_eval=True).train()
    body = model.backbone.body
    frozen = {name.partition(".")[0] for name, p in body.named_parameters() if not p.requires_grad}
    trained = {name.partition(".")[0] for name, p in body.named_parameters() if p.requires_grad}
    assert (frozen, trained) == ({"stem", "layer1", "layer2"}, {"layer3", "layer4"})
    norms = [module for module in body.modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms
    assert not any(norm.training for norm in norms)
    assert all(module.training for module in faster_rcnn(**batch_norms).train().modules())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"neck": "attention"}, "layer must be convolution or involution, got 'attention'"),
        ({"head": "attention"}, "head must be convolution or involution, got 'attention'"),
        ({"frozen_stages": 5}, "frozen_stages must be from 0 to 4, got 5"),
        (
            {"box_detections": 5, "x": 1},
            r"arguments of mask_rcnn, got 'box_detections' \(box_detections_per_img is one\), 'x'$",
        ),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mask_rcnn(**OPTIONS, **options)


def test_retinanet_refuses_arguments_of_an_rpn() -> None:
    """They would have no effect; where RetinaNet has a counterpart, the error names it."""
    wanted = (
        r"model_kwargs must be arguments of retinanet, got 'box_detections_per_img' \(detections_per_img is one\), "
        "'rpn_pre_nms_top_n_test'"
    )
    with pytest.raises(ValueError, match=wanted):
        retinanet(**OPTIONS, rpn_pre_nms_top_n_test=200, box_detections_per_img=10)


@pytest.mark.parametrize("backbone", ["rednet26", "rednetv2_26"])
def test_involutions_of_necks_and_heads_begin_as_the_identity(backbone: str) -> None:
    """Also the four in a row of Mask R-CNN's head."""
    torch.manual_seed(0)
    options = {"neck": "involution", "head": "involution", "num_classes": 2, "backbone_kwargs": NARROW}
    heads = mask_rcnn(backbone, **options).roi_heads.mask_head
    x = torch.randn(2, 256, 14, 14)
    y = x
    for block in heads:
        y = block[0](y)
    torch.testing.assert_close(y, x)
