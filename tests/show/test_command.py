"""`involution show`: names and checkpoints of every task, the pictures, and the errors."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from command_line import saved
from PIL import Image
from small_detectors import NARROW
from varied_kernels import randomised

from involution.cli import main
from involution.show.command import chosen_layers
from involution.show.layers import involutions
from involution.show.sheet import Picture, Shown, draw_heat, draw_kernels_at, draw_sheet, most_varied
from involution.show.subject import Subject, runner, subject
from involution.show.view import Grid
from involution.show.web import _parser as web_options
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
    file = tmp_path / "images" / "photograph.png"
    file.parent.mkdir()
    Image.fromarray(pixels).save(file)
    return file


def classifier() -> Any:
    model = Classifier("rednet14_cifar", 4)
    model.preprocessing = Photograph(32, 36, *THIRDS)
    return model


def segmenter() -> Any:
    options = {"backbone_kwargs": NARROW, "model_kwargs": {"channels": 16}, "neck": "involution"}
    model = Segmenter("semantic_fpn", 3, "rednet26", **options)
    model.preprocessing = Street(64, *THIRDS)
    return model


def detector(name: str = "mask_rcnn", **model_kwargs: int) -> Any:
    options: dict[str, Any] = {} if name == "retinanet" else {"head": "involution"}
    model = Detector(
        name, 2, "rednet26", neck="involution", backbone_kwargs=NARROW, model_kwargs=model_kwargs, **options
    )
    model.preprocessing = Scene(64, 96, *THIRDS)
    return model


@pytest.mark.parametrize(
    ("make", "title", "layers", "drawn", "seen"),
    [
        (classifier, "(Classifier, rednet14_cifar)", None, ["stem.conv2", "layer4.0.conv2"], "32x32"),
        (segmenter, "(Segmenter, semantic_fpn)", "pyramid.fpn.layer_blocks.1", None, "80x64"),
        (
            lambda: detector(rpn_post_nms_top_n_test=4, box_score_thresh=0.0),
            "(Detector, mask_rcnn)",
            "rpn.head.conv.0.0",
            ["rpn.head.conv.0.0", "rpn.head.conv.0.0.4"],
            "80x64",
        ),
        (lambda: detector("retinanet"), "(Detector, retinanet)", "backbone.fpn.layer_blocks.1", None, "80x64"),
    ],
)
def test_a_checkpoint_of_every_task(
    make: Any,
    title: str,
    layers: str | None,
    drawn: list[str] | None,
    seen: str,
    image: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file, output = saved(make(), tmp_path), tmp_path / "out"
    options = ["--at", "20,10", "--output", str(output), *(["--layers", layers] if layers else [])]
    assert main(["show", str(file), str(image), *options]) == 0
    text = capsys.readouterr().out
    assert f"{file.name} {title}: " in text
    assert "random weights" not in text
    assert f"{image}, 50x40, seen at {seen}" in text
    names = {one.name for one in (output / "photograph").iterdir()}
    for layer in drawn or [layers]:
        assert {f"{layer}.{what}.png" for what in ("heat", "kernels", "field")} <= names
    if "mask_rcnn" in title:
        [row] = [line for line in text.splitlines() if "roi_heads.mask_head.3.0" in line]
        assert "regions" in row
        assert "rpn.head.conv.0.0, call 4" in text
    with Image.open(output / "photograph.png") as sheet:
        assert min(sheet.size) > 200


def test_a_name_has_random_weights_and_is_reproducible(
    image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outputs = []
    for _ in range(2):
        state = torch.get_rng_state()
        options = [
            "--layers",
            "1,stem.conv2",
            "--format",
            "svg",
            "--no-receptive-field",
            "--output",
            str(tmp_path / "a"),
        ]
        assert main(["show", "rednet14_cifar", str(image), *options]) == 0
        assert torch.equal(torch.get_rng_state(), state)
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]
    assert outputs[0].startswith("rednet14_cifar (random weights): 5 involutions, 2 of them drawn\n")
    written = {str(one.relative_to(tmp_path / "a")) for one in (tmp_path / "a").rglob("*.svg")}
    layers = {
        f"photograph/{name}.{what}.svg" for name in ("layer1.0.conv2", "stem.conv2") for what in ("heat", "kernels")
    }
    assert written == {"photograph.svg"} | layers


def test_images_of_one_name_get_a_picture_each(image: Path, tmp_path: Path) -> None:
    other = tmp_path / "more" / "photograph.jpg"
    other.parent.mkdir()
    Image.new("RGB", (60, 45), "red").save(other)
    options = ["--layers", "0", "--no-receptive-field", "--output", str(tmp_path / "out")]
    assert main(["show", "rednet14_cifar", str(image), str(other), *options]) == 0
    assert {one.name for one in (tmp_path / "out").glob("*.png")} == {"photograph.png", "photograph_2.png"}


def shown_of(model: Subject, file: Path, name: str, pixel: tuple[int, int]) -> tuple[Picture, Shown]:
    picture = Image.open(file).convert("RGB")
    with torch.no_grad():
        calls, (x, view, _) = model.calls(picture, [name])
    [call] = [one for one in calls if one.kernel_map is not None]
    size = (x.shape[2], x.shape[3])
    return Picture(picture, view, [pixel]), Shown(
        call, Grid.of(call.layer, size, call.input_size, call.output_size), []
    )


def test_the_pictures_draw_the_layers_kernels_at_their_place(image: Path) -> None:
    """The image of 50x40 is resized to 40x32 and cropped by 4 pixels at the left: 4/5 of a pixel each."""
    model = randomised(subject("rednet14_cifar"))
    transform = Photograph(32, 32, *THIRDS).evaluation()
    model = model._replace(run=runner(model.network, transform))
    picture, shown = shown_of(model, image, "layer2.0.conv2", (25, 20))
    assert shown.position(picture, (25, 20)) == (
        8,
        8,
    )  # (25.5 * 0.8 - 4 - 0.5) / 2 = 7.95, (20.5 * 0.8 - 0.5) / 2 = 7.95
    left, top = (16.5 + 4 - 3.5) / 0.8, (16.5 - 3.5) / 0.8
    assert shown.footprint(picture, (25, 20)) == pytest.approx((left, top, left + 7 / 0.8, top + 7 / 0.8))
    kernel_map = shown.call.kernel_map
    assert kernel_map is not None
    assert kernel_map.shape == (2, 7, 7, 16, 16)

    figure = draw_kernels_at(picture, shown, "")
    for group, axis in enumerate(figure.axes[1:3]):
        drawn = axis.images[1]
        torch.testing.assert_close(torch.as_tensor(drawn.get_array().data), kernel_map[group, :, :, 8, 8])
        assert drawn.get_extent() == pytest.approx((left, left + 7 / 0.8, top + 7 / 0.8, top))
    figure = draw_heat(picture, shown, "")
    for group, axis in enumerate(figure.axes):
        drawn = axis.images[1]
        torch.testing.assert_close(torch.as_tensor(drawn.get_array().data), kernel_map[group].sum((0, 1)))
        assert drawn.get_extent() == pytest.approx((3.5 / 0.8, 35.5 / 0.8, 31.5 / 0.8, -0.5 / 0.8))
    varied = most_varied(shown.heat, 3)
    assert varied == sorted(range(2), key=lambda group: -shown.heat[group].std().item())
    text = draw_sheet(picture, [shown], "title").axes[0].texts[0].get_text()
    assert text.startswith("layer2.0.conv2\n7x7 stride 2, 2 groups\n16x16 positions\nsum ")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["resnet18"], 1, "model must have involutions, got resnet18 (random weights), which has none"),
        (
            ["rednet27"],
            1,
            "model must be a checkpoint of involution fit or the name of a network of timm's, got 'rednet27'",
        ),
        (["none.ckpt"], 1, "model must be a checkpoint of involution fit, got none.ckpt, which is no file"),
        (["rednet14_cifar", "--layers", "stem"], 1, "got 'stem'; there are 0 stem.conv2, 1 layer1.0.conv2"),
        (["rednet14_cifar", "--at", "50,3"], 1, "photograph.png of 50x40 pixels, got 50,3"),
        (["rednet14_cifar", "--at", "0,3"], 1, "that the network receives, x from 5 to 45 and y from 0 to 40, got 0,3"),
        (["rednet14_cifar", "--at", "3"], 2, "must be X,Y, two numbers of pixels, got '3'"),
        (["rednet14_cifar", "--format", "gif"], 2, "gif"),
    ],
)
def test_wrong_arguments(
    arguments: list[str], code: int, message: str, image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, *options = arguments
    assert main(["show", model, str(image), *options, "--output", str(tmp_path / "out")]) == code
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_wrong_files(image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.jpg"
    text.write_text("no image")
    torch.save(timm.create_model("rednet14_cifar").state_dict(), tmp_path / "plain.pt")
    for model, file, output, message in (
        ("rednet14_cifar", text, "out", f"{text} cannot be read as an image"),
        ("rednet14_cifar", tmp_path / "none.png", "out", "none.png cannot be read as an image"),
        (str(tmp_path / "plain.pt"), image, "out", "model must be a checkpoint of involution fit, got"),
        ("rednet14_cifar", image, "images", "output must be another folder than the images'"),
    ):
        assert main(["show", model, str(file), "--output", str(tmp_path / output)]) == 1
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert main(["show", "--help"]) == 0
    assert "--at X,Y" in capsys.readouterr().out


def test_layers_on_regions_cannot_be_drawn(image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = saved(detector(), tmp_path)
    assert "roi_heads.mask_head.0.0" in involutions(subject(str(file)).network)
    options = ["--layers", "roi_heads.mask_head.0.0", "--output", str(tmp_path / "out")]
    assert main(["show", str(file), str(image), *options]) == 1
    assert "got roi_heads.mask_head.0.0, which runs on regions of interest" in capsys.readouterr().err


def test_the_default_of_a_detector_is_its_stages_its_pyramid_and_its_head(tmp_path: Path) -> None:
    chosen = chosen_layers(subject(str(saved(detector(), tmp_path))), None)
    stages = [f"backbone.body.{one}.conv2" for one in ("stem", *(f"layer{stage}.0" for stage in (1, 2, 3, 4)))]
    levels = [f"backbone.fpn.layer_blocks.{level}" for level in range(4)]
    assert chosen == [*stages, *levels, "rpn.head.conv.0.0"]


def test_the_documented_options_are_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).parents[2] / "docs" / "show.md").read_text()
    main(["show", "--help"])
    told = capsys.readouterr().out + web_options().format_help()
    options, of_fit = re.compile(r"--[a-z][a-z-]+"), {"--trainer", "--model"}
    assert set(options.findall(page)) - of_fit == set(options.findall(told)) - {"--help", "--receptive-field"}
