"""Boxes, scores and losses are float32, whatever the network's dtype; and frozen means evaluation mode."""

import json
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import QUIET
from lightning.pytorch.plugins.precision import HalfPrecision
from small_detectors import FEW, NARROW, SMALL
from torch import nn

from involution.cli import main
from involution.engine.command import run
from involution.tasks.detect import COCO, faster_rcnn, mask_rcnn, retinanet
from involution.tasks.detect.targets import Targets

OPTIONS: dict[str, Any] = SMALL | {"num_classes": 2}
FAMILIES = [faster_rcnn, mask_rcnn, retinanet]
PRECISIONS = ["bf16-mixed", "bf16-true", "16-true", "64-true"]
DTYPES = {"bf16-true": torch.bfloat16, "16-true": torch.float16, "64-true": torch.float64}
TRUE_BOX = [1001.0, 1.0, 1030.0, 30.0]  # in bfloat16 [1000, 1, 1032, 30]


@cache
def build(family: Any, layer: str = "convolution") -> Any:
    """A float32 model that detects everything; its images are not resized in training."""
    torch.manual_seed(0)
    more = {"score_thresh": 0.0} if family is retinanet else {"box_score_thresh": 0.0, "head": layer, **FEW}
    return family(neck=layer, **OPTIONS, **more, _skip_resize=True)


def in_precision(model: nn.Module, precision: str, images: list[torch.Tensor], *targets: Any) -> Any:
    """A model's outputs in one of Lightning's precisions."""
    model = model.to(DTYPES.get(precision, torch.float32))
    images = [image.to(DTYPES.get(precision, torch.float32)) for image in images]
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
        return model(images, *targets)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_detections_are_float32(family: Any, precision: str) -> None:
    """So are the inputs of torchvision's NMS and RoIAlign, which lack bfloat16 kernels on some devices."""
    torch.manual_seed(0)
    with torch.no_grad():
        [found] = in_precision(deepcopy(build(family)).eval(), precision, [torch.rand(3, 64, 80)])
    assert len(found["boxes"]) > 0
    assert (found["boxes"].dtype, found["scores"].dtype) == (torch.float32, torch.float32)
    if family is mask_rcnn:
        assert found["masks"].dtype == torch.bool


@pytest.mark.parametrize(
    ("family", "precision"),
    [(family, precision) for family in FAMILIES for precision in ("bf16-mixed", "bf16-true")]
    + [(mask_rcnn, "16-true"), (retinanet, "64-true")],
)
def test_losses_and_their_inputs_are_float32(family: Any, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = deepcopy(build(family, "involution")).train()  # 3x3 convolutions in float16 take a minute on CPUs
    coders = [model.head.regression_head.box_coder] if family is retinanet else [model.rpn.box_coder]
    seen: list[torch.Tensor] = []
    for coder in coders:
        original = coder.encode_single

        def encode(reference: torch.Tensor, proposals: torch.Tensor, original: Any = original) -> torch.Tensor:
            seen.extend([reference, proposals])
            return original(reference, proposals)

        monkeypatch.setattr(coder, "encode_single", encode)
    masks = torch.zeros(1, 32, 1056, dtype=torch.uint8)
    masks[0, 1:30, 1001:1030] = 1
    target = {"boxes": torch.tensor([TRUE_BOX]), "labels": torch.tensor([2]), "masks": masks}
    losses = in_precision(model, precision, [torch.rand(3, 32, 1056)], [target])
    assert {loss.dtype for loss in losses.values()} == {torch.float32}
    assert all(loss.isfinite() for loss in losses.values())
    assert {one.dtype for one in seen} == {torch.float32}
    [true] = seen[0].unique(dim=0)[seen[0].unique(dim=0)[:, 0] > 0]
    assert true.tolist() == TRUE_BOX
    sum(losses.values()).backward()
    grads = [p.grad for p in model.parameters()]
    assert all(grad is not None and grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_scores_do_not_tie(precision: str) -> None:
    """bfloat16 has 128 values per octave. Some logits tie in float32 too, because all start close to each other."""
    torch.manual_seed(0)
    retina, model = deepcopy(build(retinanet)).head, deepcopy(build(mask_rcnn))
    level = torch.randn(1, 256, 40, 40)
    regions, masks = torch.randn(2000, 1024).relu(), torch.randn(20, 256, 14, 14).relu()
    if precision == "bf16-true":
        retina, model = retina.bfloat16(), model.bfloat16()
        level, regions, masks = level.bfloat16(), regions.bfloat16(), masks.bfloat16()
    heads = model.roi_heads
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
        outputs = [*retina([level]).values(), model.rpn.head([level])[0][0], model.rpn.head([level])[1][0]]
        outputs += [heads.box_predictor(regions)[0], heads.box_predictor(regions)[1][:, 4:]]
        outputs.append(heads.mask_predictor(masks)[:, 1:])
    for output in outputs:
        assert output.dtype == torch.float32
        assert len(output.unique()) > 0.5 * output.numel()


def test_bfloat16_does_not_change_boxes() -> None:
    """Decoding zero deltas returns the anchors themselves, also at coordinates such as 1001."""
    model = deepcopy(build(faster_rcnn)).bfloat16()
    levels = [torch.zeros(1, 256, 40, 264, dtype=torch.bfloat16)]
    model.rpn.anchor_generator.strides = (4,)
    model.rpn.anchor_generator.cell_anchors = model.rpn.anchor_generator.cell_anchors[:1]
    images = type("Images", (), {"image_sizes": [(160, 1056)]})()
    [anchors] = model.rpn.anchor_generator(images, levels)
    objectness, deltas = model.rpn.head(levels)
    assert (objectness[0].dtype, deltas[0].dtype) == (torch.float32, torch.float32)
    decoded = model.rpn.box_coder.decode(torch.zeros(len(anchors), 4), [anchors])[:, 0]
    torch.testing.assert_close(decoded, anchors, rtol=1e-6, atol=1e-4)
    assert (anchors[:, 0] % 4 != 0).any()
    assert len(anchors.unique(dim=0)) == len(anchors)


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_lightning_does_not_round_true_boxes(precision: Any) -> None:
    target = {"boxes": torch.tensor([TRUE_BOX]), "labels": torch.tensor([2])}
    images, targets = HalfPrecision(precision).convert_input(([torch.rand(3, 8, 8)], Targets([target])))
    assert images[0].dtype == DTYPES[precision]
    for moved in (targets, targets.to("cpu")):
        assert [one["boxes"].tolist() for one in moved] == [[TRUE_BOX]]
        assert (len(moved), moved[0]["labels"].tolist()) == (1, [2])


def test_loaders_return_targets(coco_folder: Path) -> None:
    data = COCO(str(coco_folder), num_workers=0, min_size=48, max_size=64)
    data.setup("fit")
    for loader, name in ((data.train_dataloader(), "boxes"), (data.val_dataloader(), "image_id")):
        images, targets = next(iter(loader))
        assert isinstance(targets, Targets)
        assert len(images) == len(targets) == 2
        assert name in targets[0]


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
def test_a_run_in_16_bits(precision: str, coco_folder: Path, tmp_path: Path) -> None:
    options = ["--data.root", str(coco_folder), "--data.num_workers", "0", "--data.min_size", "64", *QUIET]
    options += ["--data.max_size", "96", "--model.backbone", "rednet26", "--model.model_kwargs", json.dumps(FEW)]
    options += ["--model.backbone_kwargs", json.dumps(NARROW), "--trainer.limit_train_batches", "1"]
    options += ["--trainer.max_epochs", "1", "--trainer.limit_val_batches", "1", "--trainer.precision", precision]
    options += ["--trainer.default_root_dir", str(tmp_path / "runs")]
    cli = run(["fit", "-c", "mask_rcnn_rednet50_neck_head_fpn_1x", *options])
    assert torch.isfinite(cli.trainer.callback_metrics["train/loss"])
    checkpoint = Path(str(cli.trainer.log_dir)) / "checkpoints" / "last.ckpt"
    where = ["--data.predict_path", str(coco_folder / "val2017" / "0.png"), "--output", str(tmp_path / "out")]
    command = ["predict", "--ckpt_path", str(checkpoint), *where, *QUIET[:4], "--trainer.precision", precision]
    assert main(command) == 0


def test_frozen_norms_do_not_move() -> None:
    torch.manual_seed(0)
    options = OPTIONS | {"backbone_kwargs": NARROW | {"norm_layer": "batchnorm2d"}}
    model = retinanet(**options, frozen_stages=1, norm_eval=False).train()
    body = model.backbone.body

    def statistics() -> dict[str, torch.Tensor]:
        return {name: value.clone() for name, value in body.state_dict().items() if "running" in name}

    before = statistics()
    target = {"boxes": torch.tensor([[8.0, 8.0, 40.0, 48.0]]), "labels": torch.tensor([1])}
    model([torch.rand(3, 64, 80), torch.rand(3, 64, 80)], [target, target])
    moved = {name.partition(".")[0] for name, value in statistics().items() if not torch.equal(before[name], value)}
    assert moved == {"layer2", "layer3", "layer4"}
    modes = {name: module.training for name, module in body.named_children()}
    assert {name for name, mode in modes.items() if mode} == {"layer2", "layer3", "layer4"}
    assert not any(module.training for module in body.layer1.modules())
    resnet = (
        retinanet(**(options | {"backbone": "resnet26_paper", "backbone_kwargs": {}}), frozen_stages=1)
        .train()
        .backbone.body
    )
    still = {name for name, module in resnet.named_children() if not module.training}
    assert {"conv1", "bn1", "layer1"} <= still
    assert not {"layer2", "layer3", "layer4"} & still
