"""What the web page shows, without the page: predictions, kernels at a pixel, the convolutional counterpart."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import saved
from PIL import Image
from small_detectors import NARROW
from torchvision.transforms.v2.functional import pil_to_tensor
from varied_kernels import randomised

from involution.show import catch_kernel_maps
from involution.show.explore import Exploration, explore, explore_convolutions
from involution.show.mosaic import (
    BLUE,
    CELL,
    COLUMNS,
    GAP,
    PREVIEW,
    RED,
    clicked,
    draw_cells,
    draw_mosaic,
    draw_preview,
)
from involution.show.subject import subject
from involution.tasks.classify import Classifier
from involution.tasks.classify.preprocessing import Preprocessing as Photograph
from involution.tasks.detect import Detector
from involution.tasks.detect.predictions import drawn
from involution.tasks.detect.preprocessing import Preprocessing as Scene
from involution.tasks.segment import Segmenter
from involution.tasks.segment.preprocessing import Preprocessing as Street

THIRDS = ((0.3, 0.3, 0.3), (0.3, 0.3, 0.3))


def picture(width: int = 50, height: int = 40) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def explored() -> Exploration:
    return explore(randomised(subject("rednet14_cifar")), picture())


def test_kernels_at_a_pixel_are_those_of_the_layer(explored: Exploration) -> None:
    model = randomised(subject("rednet14_cifar"))
    x = model.run(picture()).input
    maps = catch_kernel_maps(model.network, x)
    assert [layer.name for layer in explored.layers] == list(maps)
    for layer in explored.layers:
        for pixel in ((25, 20), (3, 39), (49, 0)):
            column, row = layer.position(explored.view, pixel)
            torch.testing.assert_close(layer.at(explored.view, pixel), maps[layer.name][0, ..., row, column])
    kernels = explored.layers[1].at(explored.view, (25, 20))
    assert (kernels - explored.layers[1].at(explored.view, (15, 10))).abs().max() > 1e-3


def test_the_probabilities_of_a_classifier_are_its_predictions(tmp_path: Path) -> None:
    module = Classifier("rednet14_cifar", 7)
    module.preprocessing = Photograph(32, 36, *THIRDS)
    module.classes = list("abcdefg")
    found = explore(subject(str(saved(module, tmp_path))), picture()).prediction
    wanted = module.eval().predict_step(module.evaluation(picture())[None], 0)[0]
    assert len(found.scores) == 5
    assert found.scores == pytest.approx({"abcdefg"[i]: wanted[i].item() for i in wanted.topk(5).indices})


def test_the_masks_of_a_segmenter_are_its_predictions(tmp_path: Path) -> None:
    options: dict[str, Any] = {"backbone_kwargs": NARROW, "model_kwargs": {"channels": 16}, "neck": "involution"}
    module = Segmenter("semantic_fpn", 3, "rednet26", **options)
    module.preprocessing = Street(64, *THIRDS)
    module.classes = ["road", "sky", "tree"]
    found = explore(subject(str(saved(module, tmp_path))), picture())
    [mask] = module.eval().predict_step([(module.evaluation(picture()), (40, 50))], 0)
    shares = {name: (mask == index).float().mean().item() for index, name in enumerate(module.classes)}
    assert found.prediction.scores == pytest.approx({name: share for name, share in shares.items() if share})
    assert found.prediction.picture.size == (50, 40)
    colours = torch.tensor(module.palette)[mask.long()].permute(2, 0, 1)
    blended = (pil_to_tensor(picture()).float() + colours) / 2
    assert (pil_to_tensor(found.prediction.picture).float() - blended).abs().max() <= 1
    assert any("fpn" in layer.name for layer in found.layers)


def test_the_boxes_of_a_detector_are_its_predictions(tmp_path: Path) -> None:
    module = Detector(
        "mask_rcnn",
        2,
        "rednet26",
        neck="involution",
        head="involution",
        backbone_kwargs=NARROW,
        model_kwargs={"rpn_post_nms_top_n_test": 4, "box_score_thresh": 0.0},
    )
    module.preprocessing = Scene(64, 96, *THIRDS)
    module.classes = ["ball", "cup"]
    found = explore(subject(str(saved(module, tmp_path))), picture())
    [wanted] = module.eval().predict_step([module.evaluation(picture())], 0)
    best = {}
    for one in wanted:
        name = module.classes[one["label"] - 1]
        best[name] = max(best.get(name, 0.0), one["score"])
    assert found.prediction.scores == pytest.approx(best, rel=1e-4)
    boxes = drawn(pil_to_tensor(picture()), [one for one in wanted if one["score"] >= 0.5], module.classes)
    assert np.array_equal(np.asarray(found.prediction.picture), np.asarray(boxes))
    titles = [layer.title.partition(":")[0] for layer in found.layers]
    assert "rpn.head.conv.0.0, call 0" in titles
    assert not any("mask_head" in title for title in titles)


def test_the_counterparts_filters_are_its_strongest(explored: Exploration) -> None:
    model = subject("resnet14_cifar")
    beside = explore_convolutions(model, picture(), explored.layers)
    assert [layer.name for layer in beside.layers] == [layer.name for layer in explored.layers[1:]]
    for ours, theirs in zip(explored.layers[1:], beside.layers, strict=True):
        weight = dict(model.network.named_parameters())[f"{theirs.name}.weight"]
        norms = torch.linalg.vector_norm(weight, dim=(2, 3)).flatten().sort(descending=True).values
        got = torch.linalg.vector_norm(theirs.kernels, dim=(1, 2))
        torch.testing.assert_close(got, norms[: len(ours.kernels)])
        assert theirs.at(beside.view, (0, 0)) is theirs.kernels
        a, b, c, d = theirs.footprint(beside.view, (25, 20))
        left, top, right, bottom = ours.footprint(explored.view, (25, 20))
        assert (c - a) / (right - left) == pytest.approx(3 / 7)
        assert ((a + c) / 2, (b + d) / 2) == pytest.approx(((left + right) / 2, (top + bottom) / 2))


def test_colours_of_kernels() -> None:
    """Positive red, negative blue, 0 white, over the grey image; the largest weight covers nine tenths."""
    kernel = torch.tensor([[[4.0, -4.0], [0.0, 1.0]]])
    [cell] = draw_cells(Image.new("L", (10, 10), 100), (2, 2, 8, 8), kernel).astype(float)
    assert cell.shape == (CELL, CELL, 3)
    quarter = CELL // 4
    red, blue, white, half = (cell[y, x] for y in (quarter, 3 * quarter) for x in (quarter, 3 * quarter))
    assert red == pytest.approx(0.9 * RED + 0.1 * 100, abs=1)
    assert blue == pytest.approx(0.9 * BLUE + 0.1 * 100, abs=1)
    assert white == pytest.approx(0.4 * 255 + 0.6 * 100, abs=1)
    assert half == pytest.approx(0.65 * (255 + RED) / 2 + 0.35 * 100, abs=1)  # the square root of a quarter


def test_the_picture_has_a_row_per_layer_and_changes_with_the_pixel(explored: Exploration) -> None:
    alone = draw_mosaic(explored, (25, 20))
    groups = [len(layer.kernels) for layer in explored.layers]
    assert alone.height > sum(-(-count // COLUMNS) * (CELL + GAP) for count in groups)
    assert np.abs(np.asarray(alone, float) - np.asarray(draw_mosaic(explored, (10, 30)), float)).max() > 50
    beside = explore_convolutions(subject("resnet14_cifar"), picture(), explored.layers)
    both = draw_mosaic(explored, (25, 20), beside)
    assert both.width == alone.width
    assert both.height > 1.5 * alone.height


@pytest.mark.parametrize("size", [(8, 8), (50, 40), (900, 700)])
def test_a_click_on_the_drawn_cross_is_its_pixel(size: tuple[int, int], explored: Exploration) -> None:
    image = picture(*size)
    shown = explored._replace(image=image, prediction=explored.prediction._replace(picture=image), layers=[])
    pixel = size[0] // 3, size[1] // 2
    red = np.abs(np.asarray(draw_preview(shown, pixel), float) - [255, 0, 0]).max(2) == 0
    assert max(red.shape) == PREVIEW
    rows, columns = red.nonzero()
    assert clicked(shown, columns.mean(), rows.mean()) == pytest.approx(pixel, abs=1)
    assert clicked(shown, PREVIEW + 9, -3) == (size[0] - 1, 0)
