"""`involution doctor MODEL`: a name or a checkpoint of any task, with an image or without."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from command_line import saved
from PIL import Image

from involution.cli import main
from involution.tasks.classify import Classifier
from involution.tasks.classify.preprocessing import Preprocessing as Photograph
from involution.tasks.detect import Detector
from involution.tasks.detect.preprocessing import Preprocessing as Scene
from involution.tasks.segment import Segmenter
from involution.tasks.segment.preprocessing import Preprocessing as Street

THIRDS = ((0.3, 0.3, 0.3), (0.3, 0.3, 0.3))


@pytest.fixture
def image(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photograph.png")
    return tmp_path / "photograph.png"


def classifier() -> Any:
    model = Classifier("rednet14_cifar", 4, model_kwargs={"zero_init_last": False})
    model.preprocessing = Photograph(32, 36, *THIRDS)
    return model


def segmenter(name: str = "semantic_fpn") -> Any:
    neck = {"neck": "involution"} if name == "semantic_fpn" else {}
    model = Segmenter(name, 3, "rednet26", model_kwargs={"channels": 16}, **neck)
    model.preprocessing = Street(64, *THIRDS)
    return model


def detector(name: str = "faster_rcnn") -> Any:
    head = {} if name == "retinanet" else {"head": "involution"}
    few = {"topk_candidates": 10} if name == "retinanet" else {"rpn_post_nms_top_n_test": 4}
    model = Detector(name, 2, "rednet26", neck="involution", **head, model_kwargs=few)
    model.preprocessing = Scene(64, 96, *THIRDS)
    return model


@pytest.mark.parametrize(
    ("make", "layers"),
    [
        (classifier, ["stem.conv2", "layer4.0.conv2"]),
        (segmenter, ["pyramid.body.stem.conv2", "pyramid.fpn.layer_blocks.3"]),
        (lambda: segmenter("upernet"), ["body.layer4.0.conv2"]),
        (detector, ["backbone.body.layer1.0.conv2", "backbone.fpn.layer_blocks.0", "rpn.head.conv.0.0"]),
        (lambda: detector("mask_rcnn"), ["rpn.head.conv.0.0", "roi_heads.mask_head.3.0"]),
        (lambda: detector("retinanet"), ["backbone.fpn.layer_blocks.2"]),
    ],
)
def test_a_checkpoint_of_every_task(
    make: Any, layers: list[str], image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = saved(make(), tmp_path)
    capsys.readouterr()
    assert main(["doctor", str(file), "--image", str(image)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{file}, {image} and its mirror image"
    named = {line.split()[0] for line in lines if line}
    assert set(layers) <= named
    assert any(line.startswith("loss in training ") for line in lines)


def test_a_name_with_noise_is_reproducible(image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outputs = []
    for _ in range(2):
        state = torch.get_rng_state()
        assert main(["doctor", "rednet14_cifar"]) == 0
        assert torch.equal(torch.get_rng_state(), state)
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]
    assert outputs[0].startswith("rednet14_cifar, noise and its mirror image\n")
    assert main(["doctor", "rednet14_cifar", "--image", str(image)]) == 0
    assert capsys.readouterr().out != outputs[0]


def test_a_checkpoint_with_nan_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = classifier()
    with torch.no_grad():
        model.net.layer2[0].conv3.weight.fill_(torch.nan)
    assert main(["doctor", str(saved(model, tmp_path))]) == 0
    assert "non-finite parameters: layer2.0.conv3.weight: resume from the last good" in capsys.readouterr().out


def test_wrong_arguments(tmp_path: Path, image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(timm.create_model("rednet14_cifar").state_dict(), tmp_path / "plain.pt")
    for model, code, message in (
        (
            "rednet27",
            1,
            "model must be a checkpoint of involution fit or the name of a network of timm's, got 'rednet27'",
        ),
        (str(tmp_path / "none.ckpt"), 1, "none.ckpt, which is no file"),
        (str(tmp_path / "plain.pt"), 1, "model must be a checkpoint of involution fit, got"),
        (str(image), 1, "model must be a checkpoint of involution fit, got"),
        ("--image=a.png", 2, "--image needs a model"),
    ):
        assert main(["doctor", model]) == code
        assert message in capsys.readouterr().err
    assert main(["doctor", "rednet14_cifar", "--image", str(tmp_path / "none.png")]) == 1
    assert "none.png" in capsys.readouterr().err
    assert main(["doctor", "--help"]) == 0
    assert "RMS of input" in capsys.readouterr().out


def test_diagnosing_a_batch_does_not_change_the_module() -> None:
    model = classifier().train()
    before = {name: one.clone() for name, one in model.state_dict().items()}
    images, labels = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 3])
    found = model.diagnose((images, labels))
    assert found.loss == pytest.approx(torch.nn.functional.cross_entropy(model(images), labels).item(), rel=1e-4)
    with torch.no_grad():  # that moved the statistics
        for name, one in model.named_buffers():
            one.copy_(before[name]) if name in before else None
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())
