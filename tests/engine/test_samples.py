"""What a run leaves to look at: curves.png, and sample predictions in TensorBoard."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from small_detectors import NARROW
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from involution.engine.command import run
from involution.tasks.classify import Classifier
from involution.tasks.classify.preprocessing import Preprocessing as Photograph
from involution.tasks.detect import Detector
from involution.tasks.detect.preprocessing import Preprocessing as Scene
from involution.tasks.segment import Segmenter
from involution.tasks.segment.preprocessing import IGNORED
from involution.tasks.segment.preprocessing import Preprocessing as Street

THIRDS = ((0.3, 0.3, 0.3), (0.3, 0.3, 0.3))


def test_a_run_leaves_curves_and_sample_predictions(in_tmp_path: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every validation, but not of the one before training."""
    monkeypatch.setattr("involution.engine.curves.SECONDS", 0.0)
    options = ["--trainer.accelerator", "cpu", "--trainer.max_epochs", "2", "--trainer.limit_train_batches", "2"]
    options += ["--trainer.limit_val_batches", "2", "--trainer.num_sanity_val_steps", "1", "--data.batch_size", "4"]
    small = "{channels: [16, 16, 16, 16], stem_channels: 32}"
    run(["fit", "-c", "digits_rednet", *options, "--model.model_kwargs", small])
    folder = Path("runs/digits_rednet/version_0")
    with Image.open(folder / "curves.png") as curves:
        assert curves.size == (1200, 480)
    events = EventAccumulator(str(folder), size_guidance={"images": 0})
    events.Reload()
    assert events.Tags()["images"] == ["val/predictions"]
    logged = events.Images("val/predictions")
    assert [one.step for one in logged] == [2, 4]
    picture = Image.open(io.BytesIO(logged[1].encoded_image_string))
    assert picture.width == 4 * 192  # four digits in a row


def test_a_classifiers_picture_names_wrong_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    module = Classifier("rednet14_cifar", 3)
    module.preprocessing, module.classes = Photograph(32, 32, *THIRDS), ["cat", "dog", "owl"]
    images = torch.rand(3, 3, 32, 32)
    scores = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.2, 0.7], [0.0, 1.0, 0.0]])
    told: list[Any] = []
    monkeypatch.setattr(module, "predict_step", lambda given, _: scores[: len(given)])
    monkeypatch.setattr("involution.tasks.classify.module.draw_grid", lambda cells, columns: told.extend(cells))
    module.illustrate(((images - 0.3) / 0.3, torch.tensor([0, 1, 1])), 2)
    assert [ranking for _, ranking in told] == [[("cat", pytest.approx(0.7))], [("owl, is dog", pytest.approx(0.7))]]
    shown = np.asarray(told[0][0].resize((32, 32)), float) / 255
    assert np.abs(shown.mean((0, 1)) - images[0].mean((1, 2)).numpy()).max() < 0.02


def test_a_segmenters_picture_has_its_classes_beside_the_masks() -> None:
    options: dict[str, Any] = {"backbone_kwargs": NARROW, "model_kwargs": {"channels": 16}}
    module = Segmenter("semantic_fpn", 3, "rednet26", **options).eval()
    module.preprocessing, module.classes = Street(32, *THIRDS), ["road", "sky", "tree"]
    images = [torch.randn(3, 32, 48) for _ in range(6)]
    masks = [torch.full((64, 96), 2, dtype=torch.uint8), torch.full((64, 96), IGNORED, dtype=torch.uint8)] * 3
    with torch.no_grad():
        picture = np.asarray(module.illustrate((images, masks), 2), float)
        found = module._classes(images[0], (32, 48))
    height = len(picture) // 2
    assert picture.shape[1] == 2 * 48
    for left, classes in ((0, found), (48, torch.full((32, 48), 2))):
        wanted = (np.asarray(module.pixels(images[0]).permute(1, 2, 0), float) + np.array(module.palette)[classes]) / 2
        assert np.abs(picture[:32, left : left + 48] - wanted).max() <= 1
    assert np.array_equal(picture[height : height + 32, :48], picture[height : height + 32, 48:])  # nothing is known


def test_a_detectors_picture_has_its_images() -> None:
    module = Detector("retinanet", 2, "rednet26", backbone_kwargs=NARROW).eval()
    module.preprocessing = Scene(64, 96, *THIRDS)
    images = [torch.rand(3, 40, 50) for _ in range(3)]
    with torch.no_grad():
        picture = np.asarray(module.illustrate((images, [{}] * 3), 8))
    assert picture.shape == (80, 100, 3)
    assert np.abs(picture[:40, :50].astype(float) / 255 - images[0].permute(1, 2, 0).numpy()).max() < 0.01
