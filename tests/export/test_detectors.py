"""Detectors as exported: the same detections as the detector's own, in torch and in onnxruntime."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import saved
from small_detectors import FEW, NARROW
from torch import Tensor, nn

from involution.cli import main
from involution.export.detectors import OUTPUTS, detections
from involution.tasks.detect import Detector
from involution.tasks.detect.preprocessing import Preprocessing

HEIGHT, WIDTH = 64, 96
NAMES = ["faster_rcnn", "mask_rcnn", "retinanet"]
INVOLUTIONS = {"neck": "involution", "head": "involution"}


def detector(name: str, score: float = 0.0, **options: Any) -> Detector:
    """Untrained, with scores and boxes that differ from anchor to anchor."""
    torch.manual_seed(0)
    own = {"score_thresh": score} if name == "retinanet" else FEW | {"box_score_thresh": score}
    model = Detector(name, 3, "rednet26", backbone_kwargs=NARROW, model_kwargs=own, **options)
    with torch.no_grad():
        for parameter in model.net.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    model.preprocessing, model.classes = Preprocessing(HEIGHT, WIDTH, (0.5,) * 3, (0.25,) * 3), ["a", "b", "c"]
    return model.eval()


def images() -> Tensor:
    """[1, 3, HEIGHT, WIDTH] in 0..1."""
    return torch.rand(1, 3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(1))


def wanted(model: Detector, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The detector's own detections, masks inside their boxes instead of pasted into the image."""
    monkeypatch.setattr("involution.tasks.detect.regions.paste_masks", lambda masks, boxes, size: masks)
    with torch.no_grad():
        [found] = model([images()[0]])
    return [found[name].flatten(0, 1) if name == "masks" else found[name] for name in OUTPUTS if name in found]


def normalised() -> Tensor:
    return (images() - 0.5) / 0.25


@pytest.mark.parametrize("name", NAMES)
def test_detections_are_the_detectors(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the maximum number of detections, with some, and with none."""
    model, counts = detector(name), []
    thresholded = model.net if name == "retinanet" else model.net.roi_heads
    scores = wanted(model, monkeypatch)[1]
    for threshold in (0.0, float(scores.median()), float(scores.max())):
        thresholded.score_thresh = threshold
        expected = wanted(model, monkeypatch)
        counts.append(len(expected[0]))
        with torch.no_grad():
            found = detections(model.net)(normalised())
        assert len(found) == len(expected) == (4 if name == "mask_rcnn" else 3)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert counts[0] == (100 if name == "retinanet" else 10)
    assert 0 < counts[1] < counts[0]
    assert counts[2] == 0


@pytest.mark.slow
@pytest.mark.parametrize(("name", "score"), [*((name, 0.0) for name in NAMES), ("mask_rcnn", 1.0)])
def test_a_detector_for_onnx(
    name: str, score: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where nothing is found."""
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    options = INVOLUTIONS if name != "retinanet" else {"neck": "involution"}
    model = detector(name, score, **options)
    expected = wanted(model, monkeypatch)
    file = tmp_path / "a.onnx"
    assert main(["export", str(saved(model, tmp_path)), "--to", "onnx", "--output", str(file)]) == 0
    assert f"wrote {file}: one image of {HEIGHT}x{WIDTH}; outputs boxes, scores, labels" in capsys.readouterr().out
    assert {node.domain for node in onnx.load(file).graph.node} == {""}
    session = onnxruntime.InferenceSession(str(file))
    told = session.get_modelmeta().custom_metadata_map
    assert (told["task"], json.loads(told["image_size"])) == ("detect", [HEIGHT, WIDTH])
    found = session.run(None, {"images": normalised().numpy()})
    # Pixels, scores, labels, masks: with these weights torch's own masks differ by 2e-4 between its memory formats.
    for one, other, atol in zip(found, expected, (0.02, 1e-4, 0, 1e-3), strict=False):
        np.testing.assert_allclose(one, other.numpy(), rtol=1e-4, atol=atol)
    assert len(found) == len(expected)


def test_a_detector_for_torch_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, file = detector("retinanet"), tmp_path / "a.pt2"
    expected = wanted(model, monkeypatch)
    assert main(["export", str(saved(model, tmp_path)), "--to", "pt2", "--output", str(file)]) == 0
    with torch.no_grad():
        found = torch.export.load(file).module()(normalised())
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["pt2", "--image-size", "64", "90"], "image-size must be multiples of 32 for a detector, got [64, 90]"),
        (["aoti"], "--to must be onnx or pt2 for a detector, got aoti, which has no non-maximum suppression"),
    ],
)
def test_what_detectors_cannot(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(saved(detector("retinanet"), tmp_path)), "--to", *options]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_torchvisions_own_detectors_stop_where_ours_do_not() -> None:
    """Why the steps are written anew: once torchvision's can be traced, they need not be."""
    from torchvision.models.detection import retinanet_resnet50_fpn

    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = retinanet_resnet50_fpn(weights=None, weights_backbone=None, min_size=64, max_size=96).eval()

        def forward(self, image: Tensor) -> Any:
            return self.net([image])

    with pytest.raises(Exception, match="data-dependent"), torch.no_grad():
        torch.export.export(One().eval(), (images()[0],))
