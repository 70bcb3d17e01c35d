"""`involution export`: names and checkpoints, what is written, and what is said where it does not fit."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from command_line import saved
from elsewhere import CHECK, elsewhere

from involution.cli import main
from involution.tasks.classify import Classifier
from involution.tasks.classify.preprocessing import Preprocessing as Photograph
from involution.tasks.segment import Segmenter
from involution.tasks.segment.preprocessing import Preprocessing as Street

THIRDS = ((0.3, 0.3, 0.3), (0.3, 0.3, 0.3))
SMALL = {"kernel_size": 3, "zero_init_last": False}


def classifier() -> Any:
    model = Classifier("rednetv2_14_cifar", 2, model_kwargs=SMALL)
    model.preprocessing, model.classes = Photograph(32, 36, *THIRDS), ["cat", "dög"]
    return model


def segmenter(name: str) -> Any:
    model = Segmenter(name, 2, "rednet26", backbone_kwargs=SMALL, model_kwargs={"channels": 16})
    model.preprocessing = Street(64, *THIRDS)
    return model


def test_a_classifier_for_onnx(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    model = classifier().eval()
    file = tmp_path / "a.onnx"
    assert main(["export", str(saved(model, tmp_path)), "--to", "onnx", "--output", str(file)]) == 0
    assert f"wrote {file}: any batch and image size; outputs logits" in capsys.readouterr().out
    session = onnxruntime.InferenceSession(str(file))
    told = session.get_modelmeta().custom_metadata_map
    assert json.loads(told["classes"]) == ["cat", "dög"]
    assert json.loads(told["preprocessing"])["image_size"] == 32
    assert told["task"] == "classify"
    images = torch.randn(3, 3, 40, 33)
    with torch.no_grad():
        wanted = model.net(images).numpy()
    np.testing.assert_allclose(session.run(["logits"], {"images": images.numpy()})[0], wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["semantic_fpn", "upernet"])
def test_a_segmenter_for_onnx(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    model = segmenter(name).eval()
    file = tmp_path / "a.onnx"
    assert main(["export", str(saved(model, tmp_path)), "--to", "onnx", "--output", str(file)]) == 0
    assert "any batch and image size in multiples of 32" in capsys.readouterr().out
    session = onnxruntime.InferenceSession(str(file))
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        wanted = model.net(images)["out"].numpy()
    np.testing.assert_allclose(session.run(["logits"], {"images": images.numpy()})[0], wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["semantic_fpn", "upernet"])
@pytest.mark.parametrize(
    "options", [["pt2", "--decompose"], ["aoti", "--static", "--image-size", "64", "96"]], ids=lambda given: given[0]
)
def test_a_segmenter_runs_without_this_package(options: list[str], name: str, tmp_path: Path) -> None:
    runs_elsewhere(segmenter(name), (64, 96), options, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("options", [["onnx"], ["aoti", "--static"]], ids=lambda given: given[0])
def test_rednet50_runs_without_this_package(options: list[str], tmp_path: Path) -> None:
    model = Classifier("rednetv2_50", 10, model_kwargs={"kernel_init": "paper", "zero_init_last": False})
    model.preprocessing, model.classes = Photograph(224, 256, *THIRDS), [*"0123456789"]
    runs_elsewhere(model, (224, 224), options, tmp_path)


LOADED = {
    "onnx": """
import onnxruntime
session = onnxruntime.InferenceSession('exported.pt2')
run = lambda images: torch.from_numpy(session.run(['logits'], {'images': images.numpy()})[0])
""",
    "pt2": "run = torch.export.load('exported.pt2').module()",
    "aoti": "import torch._inductor; run = torch._inductor.aoti_load_package('exported.pt2')",
}


def runs_elsewhere(model: Any, size: tuple[int, int], options: list[str], folder: Path) -> None:
    """Exports a model and holds its logits in another process against its own."""
    file = folder / "exported.pt2"
    assert main(["export", str(saved(model, folder)), "--output", str(file), "--to", *options]) == 0
    images = torch.randn(1, 3, *size)
    with torch.no_grad():
        found = model.eval().net(images)
    torch.save(images, folder / "x.pt")
    torch.save(found["out"] if isinstance(found, dict) else found, folder / "y.pt")
    assert elsewhere(LOADED[options[0]] + CHECK, folder) == "agrees\n"


def test_a_name_for_torch_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    assert main(["export", "rednetv2_14_cifar", "--to", "pt2", "--static", "--image-size", "32", "24"]) == 0
    torch.manual_seed(0)
    network = timm.create_model("rednetv2_14_cifar").eval()
    extra = {"metadata.json": ""}
    program = torch.export.load("rednetv2_14_cifar.pt2", extra_files=extra)
    told = json.loads(extra["metadata.json"])
    assert (told["model"], told["image_size"]) == ("rednetv2_14_cifar", [32, 24])
    assert told["preprocessing"]["mean"] == [0.4914, 0.4822, 0.4465]
    images = torch.randn(1, 3, 32, 24)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(images), network(images), rtol=1e-4, atol=1e-4)


def test_wrong_calls(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.ckpt").write_text("nothing")
    bare = classifier()
    bare.preprocessing = None
    to = ["--to", "pt2"]
    for arguments, code, message in (
        (["rednet27", *to], 1, "or the name of a network of timm's, got 'rednet27'"),
        ([str(tmp_path / "none.ckpt"), *to], 1, "which is no file"),
        ([str(tmp_path / "text.ckpt"), *to], 1, "model must be a checkpoint of involution fit, got"),
        ([str(saved(bare, tmp_path)), *to], 1, "model must carry its preprocessing, got"),
        ([str(tmp_path / "a.ckpt"), *to, "--pretrained"], 1, "pretrained is for names of timm's, got the checkpoint"),
        (["rednet14_cifar", "--to", "aoti", "--decompose"], 1, "decompose is for --to pt2, got --to aoti"),
        (["rednet14_cifar", *to, "--image-size", "0", "8"], 1, "image-size must be positive, got [0, 8]"),
        (["rednet14_cifar", "--to", "coreml"], 2, "invalid choice: 'coreml'"),
        (["rednet14_cifar"], 2, "--to"),
    ):
        assert main(["export", *arguments]) == code, arguments
        assert message in capsys.readouterr().err
