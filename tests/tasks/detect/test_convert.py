"""Detectors of mmdet 2.x: what is converted computes what the published network computes, part by part."""

from functools import partial
from pathlib import Path
from typing import Any

import published_networks as published
import pytest
import timm
import torch
from torch import Tensor, nn

from involution.cli import main
from involution.tasks.detect import Detector, retinanet
from involution.tasks.detect import convert as names
from involution.zoo import load_checkpoint
from involution.zoo.checkpoints import load_backbone
from involution.zoo.official import name_in_detector, renamed

GENERATOR = torch.Generator().manual_seed(1)
IMAGES = torch.randn(2, 3, 64, 64, generator=GENERATOR)
BOXES, MASKS = torch.randn(3, 256, 7, 7, generator=GENERATOR), torch.randn(2, 256, 14, 14, generator=GENERATOR)
NAMES = [f"thing {index}" for index in range(80)]


def converted(theirs: nn.Module, folder: Path, classes: list[str] | None = NAMES) -> Detector:
    """By way of a file as mmdet writes it, and of a checkpoint as `involution fit` writes it."""
    meta: dict[str, Any] = {"mmdet_version": "2.11.0", "epoch": 12} | ({"CLASSES": tuple(classes)} if classes else {})
    torch.save({"meta": meta, "state_dict": theirs.state_dict(), "optimizer": {}}, folder / "theirs.pth")
    assert main(["convert", str(folder / "theirs.pth"), str(folder / "ours.ckpt")]) == 0
    return Detector.load_from_checkpoint(folder / "ours.ckpt", map_location="cpu", weights_only=True).eval()


def agree(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    """In float64, but for the heads' last layers, which compute in float32."""
    assert set(got) == set(want)
    for name, one in want.items():
        scale = float(one.abs().max())
        torch.testing.assert_close(got[name].double(), one, rtol=1e-5, atol=1e-5 * scale, msg=name)


def numbered(name: str, values: Any) -> dict[str, Tensor]:
    return {f"{name} {index}": one for index, one in enumerate(values)}


@pytest.mark.parametrize("layer", ["convolution", "involution"])
def test_a_mask_rcnn_computes_the_same(layer: str, tmp_path: Path) -> None:
    theirs = published.settled(published.TwoStage(layer, layer, True), IMAGES, BOXES, MASKS)
    module = converted(theirs, tmp_path)
    assert module.classes == NAMES
    given = module.hparams
    assert (given["model_name"], given["neck"], given["head"]) == ("mask_rcnn", layer, layer)
    assert (given["backbone"], given["backbone_kwargs"]) == ("rednet26", {"stem_kernel_size": 7})
    ours, theirs = module.net.double(), theirs.double()
    with torch.no_grad():
        levels = list(ours.backbone(IMAGES.double()).values())
        objectness, deltas = ours.rpn.head(levels)
        scores, box_deltas = ours.roi_heads.box_predictor(ours.roi_heads.box_head(BOXES.double()))
        masks = ours.roi_heads.mask_predictor(ours.roi_heads.mask_head(MASKS.double()))
        got = numbered("level", levels) | numbered("objectness", objectness) | numbered("proposal deltas", deltas)
        # torchvision has the background first, and a slot of zeros for its box and mask
        got |= {"scores": torch.cat([scores[:, 1:], scores[:, :1]], dim=1), "deltas": box_deltas[:, 4:]}
        agree(got | {"masks": masks[:, 1:]}, theirs(IMAGES.double(), BOXES.double(), MASKS.double()))


def test_a_retinanet_computes_the_same(tmp_path: Path) -> None:
    theirs = published.settled(published.RetinaNet("involution", num_classes=4), IMAGES)
    module = converted(theirs, tmp_path, None)
    assert (module.hparams["model_name"], module.hparams["neck"]) == ("retinanet", "involution")
    assert module.classes == ["0", "1", "2", "3"]
    net, theirs = module.net.double(), theirs.double()
    with torch.no_grad():
        levels = list(net.backbone(IMAGES.double()).values())
        got = numbered("level", levels)
        for name, branch, last in (
            ("scores", net.head.classification_head, net.head.classification_head.cls_logits),
            ("deltas", net.head.regression_head, net.head.regression_head.bbox_reg),
        ):
            got |= numbered(name, [last(branch.conv(level)) for level in levels])
        agree(got, theirs(IMAGES.double()))


@pytest.mark.parametrize(
    "theirs",
    [
        partial(published.TwoStage, "convolution", "convolution", False),
        partial(published.TwoStage, "involution", "convolution", False),
        partial(published.TwoStage, "involution", "involution", False),
        partial(published.TwoStage, "convolution", "convolution", True),
        partial(published.TwoStage, "involution", "convolution", True),
        partial(published.TwoStage, "involution", "involution", True),
        partial(published.RetinaNet, "convolution"),
        partial(published.RetinaNet, "involution"),
    ],
    ids=lambda theirs: " ".join(map(str, (theirs.func.__name__, *theirs.args))),
)
def test_every_tensor_of_the_published_detectors_has_its_place(theirs: Any) -> None:
    """RedNet-50, as published: names and shapes, without values."""
    with torch.device("meta"):
        weights = renamed(theirs(depth=50).state_dict(), name_in_detector, "the test")
        arguments, ours, _ = names.converted(weights, Path("the test"))
        wanted = Detector(**arguments).net.state_dict()
    assert (arguments["backbone"], arguments["num_classes"]) == ("rednet50", 80)
    assert {name: one.shape for name, one in ours.items()} == {name: one.shape for name, one in wanted.items()}


def test_anchors_are_in_the_order_of_the_published_channels() -> None:
    """mmdet's channels are for ratios and, within each, for scales; RetinaNet's boxes are of 4, 4 * 2**(1/3), ..."""
    ours = retinanet("rednet26").anchor_generator
    (cells, *_) = ours.cell_anchors
    wanted = []
    for ratio in (0.5, 1.0, 2.0):
        for octave in range(3):
            size = 8 * 4 * 2 ** (octave / 3)
            width, height = size / ratio**0.5, size * ratio**0.5
            wanted.append([-width / 2, -height / 2, width / 2, height / 2])
    torch.testing.assert_close(cells, torch.tensor(wanted))


def test_detections_have_the_label_of_the_class_that_scores(tmp_path: Path) -> None:
    """Where the published head finds class 5, counted from 0, in every region, the objects have label 6."""
    theirs = published.settled(published.TwoStage("convolution", "convolution", False), IMAGES, BOXES)
    with torch.no_grad():
        theirs.roi_head.bbox_head.fc_cls.weight.zero_()
        theirs.roi_head.bbox_head.fc_cls.bias.zero_()[5] = 9
    module = converted(theirs, tmp_path)
    mean, std = (torch.tensor(one)[:, None, None] for one in module.preprocessing[2:])
    module.preprocessing = module.preprocessing._replace(min_size=64)
    with torch.no_grad():
        found = module([IMAGES[0] * std + mean])[0]
    assert len(found["labels"]) > 0
    assert set(found["labels"].tolist()) == {6}


def test_plain_weights_and_back(tmp_path: Path) -> None:
    theirs = published.TwoStage("involution", "involution", True, num_classes=3)
    module = converted(theirs, tmp_path, ["a", "b", "c"])
    plain, back = tmp_path / "plain.safetensors", tmp_path / "back.ckpt"
    assert main(["convert", str(tmp_path / "theirs.pth"), str(plain)]) == 0
    assert main(["convert", str(plain), str(back)]) == 0
    again = Detector.load_from_checkpoint(back, map_location="cpu", weights_only=True)
    assert again.classes == ["a", "b", "c"]
    assert again.preprocessing == module.preprocessing
    state = module.state_dict()
    assert all(torch.equal(one, state[name]) for name, one in again.state_dict().items())
    for file in ("theirs.pth", "ours.ckpt", "plain.safetensors"):
        with pytest.raises(
            ValueError, match=rf"must be of a classifier or backbone, got .*{file}, whose task is detect"
        ):
            load_checkpoint(tmp_path / file)


def test_its_backbone_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    theirs = published.settled(published.TwoStage("involution", "convolution", False), IMAGES, BOXES)
    file, out = tmp_path / "theirs.pth", tmp_path / "OUT.safetensors"
    torch.save({"meta": {}, "state_dict": theirs.state_dict()}, file)
    assert main(["convert", str(file), str(out), "--backbone"]) == 0
    assert '"rednet26", stem_kernel_size=7, num_classes=0, checkpoint_path=' in capsys.readouterr().out
    ours = timm.create_model("rednet26", stem_kernel_size=7, num_classes=0, checkpoint_path=str(out)).eval()
    body = timm.create_model("rednet26", stem_kernel_size=7, features_only=True, out_indices=(1, 2, 3, 4)).eval()
    left_out = load_backbone(body, file, "rednet50")
    assert {name.split(".")[0] for name in left_out} == {"neck", "rpn_head", "roi_head"}
    with torch.no_grad():
        x = IMAGES.double()
        want = theirs.double().backbone(x)
        agree(
            numbered("stage", ours.double().forward_intermediates(x, 4, intermediates_only=True)),
            numbered("stage", want),
        )
        agree(numbered("stage", body.double()(x)), numbered("stage", want))


def test_all_that_does_not_fit_is_in_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = published.TwoStage("convolution", "convolution", True).state_dict()
    del weights["neck.fpn_convs.2.conv.bias"]
    weights["roi_head.mask_head.surplus"] = torch.zeros(1)
    weights["rpn_head.rpn_cls.weight"] = torch.zeros(9, 256, 1, 1)
    torch.save({"state_dict": weights}, tmp_path / "theirs.pth")
    assert main(["convert", str(tmp_path / "theirs.pth"), str(tmp_path / "ours.ckpt")]) == 1
    message = capsys.readouterr().err
    assert "missing: backbone.fpn.layer_blocks.2.0.bias;" in message
    assert "unexpected: roi_head.mask_head.surplus;" in message
    assert "rpn.head.cls_logits.weight [9, 256, 1, 1] for [3, 256, 1, 1]" in message
