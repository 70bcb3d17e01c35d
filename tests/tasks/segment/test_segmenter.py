"""Training, evaluating and predicting with segmenters, through the command line."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from command_line import QUIET, metrics, validate_alone_and_together
from PIL import Image
from sklearn.metrics import confusion_matrix

from involution.cli import main
from involution.engine.command import TaskCLI, run
from involution.engine.recipes import recipes
from involution.tasks.segment import Cityscapes, Segmenter
from involution.tasks.segment.evaluation import scores
from involution.tasks.segment.module import pixel_loss, warmup_poly
from involution.tasks.segment.preprocessing import RandomCrop

NAMES = ["ground", "red", "green"]
NARROW = '{"layers": [1, 1, 1, 1], "channels": [32, 64, 128, 256]}'
SMALL = ["--data.num_workers", "0", "--data.resize", "48", "--data.crop", "[48, 64]"]
Weights = dict[str, torch.Tensor]
RECIPES = {name: file for name, file in recipes().items() if file.parts[-3] == "segment"}


def fit(root: Path, *options: str) -> TaskCLI:
    data = ["--data.root", str(root), "--data.classes", json.dumps(NAMES), *SMALL]
    narrow = ["--model.backbone", "rednet26", "--model.backbone_kwargs", NARROW]
    return run(["fit", "-c", "masks_rednet50", *narrow, *data, *QUIET, *options])


@pytest.fixture(scope="module")
def trained(make_masks: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run's folder of a semantic FPN trained on the rectangles."""
    root = make_masks(tmp_path_factory.mktemp("trained") / "masks", train=24)
    options = ["--model.lr", "0.05", "--model.lr_batch_size", "null", "--model.warmup_steps", "10"]
    options += ["--data.batch_size", "4", "--data.scale", "[0.8, 1.2]", "--data.photometric", "false"]
    options += ["--trainer.max_epochs", "12", "--trainer.check_val_every_n_epoch", "12"]
    options += ["--trainer.log_every_n_steps", "2", "--trainer.default_root_dir", str(root.parent / "runs")]
    return Path(str(fit(root, *options).trainer.log_dir))


def test_a_run_learns_and_logs(trained: Path) -> None:
    rows = metrics(trained)
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    assert len(losses) == 12
    assert losses[-1] < 0.5 * losses[0]
    [last] = [row for row in rows if "val/mIoU" in row]
    assert {name for name in last if name.startswith("val/")} == {
        f"val/{name}" for name in ("mIoU", "mean_accuracy", "pixel_accuracy", "IoU_ground", "IoU_red", "IoU_green")
    }
    assert last["val/mIoU"] > 0.5
    rates = [row["lr"] for row in rows if "lr" in row]
    assert max(rates) > 0.03
    assert rates[-1] < 0.01


def test_scores_are_those_of_all_pixels_together(trained: Path) -> None:
    """Against scikit-learn's confusion matrix of the module's own predictions for the validation images."""
    model = Segmenter.load_from_checkpoint(trained / "checkpoints" / "last.ckpt", map_location="cpu").eval()
    root = trained.parents[1] / "masks"
    predicted, true = [], []
    with torch.no_grad():
        for file in sorted((root / "images" / "val").glob("*.png")):
            [ids] = model.predict_step([model.read(file)], 0)
            mask = np.asarray(Image.open(root / "masks" / "val" / file.name))
            assert ids.shape == mask.shape
            predicted.append(ids.numpy()[mask != 255])
            true.append(mask[mask != 255])
    matrix = confusion_matrix(np.concatenate(true), np.concatenate(predicted), labels=range(3))
    right, wanted = matrix.diagonal(), matrix.sum(1) + matrix.sum(0) - matrix.diagonal()
    [logged] = [row for row in metrics(trained) if "val/mIoU" in row]
    assert logged["val/mIoU"] == pytest.approx((right / wanted).mean(), abs=1e-6)
    assert logged["val/pixel_accuracy"] == pytest.approx(right.sum() / matrix.sum(), abs=1e-6)
    assert [logged[f"val/IoU_{name}"] for name in NAMES] == pytest.approx((right / wanted).tolist(), abs=1e-6)
    assert logged["val/mean_accuracy"] == pytest.approx((right / matrix.sum(1)).mean(), abs=1e-6)
    each = [confusion_matrix(t, p, labels=range(3)) for t, p in zip(true, predicted, strict=True)]
    of_batches = np.mean([(m.diagonal() / (m.sum(1) + m.sum(0) - m.diagonal())).mean() for m in each])
    # The mean over images is another number, by more than the 1e-6 above.
    assert abs(of_batches - logged["val/mIoU"]) > 1e-5


def test_classes_that_do_not_occur_are_left_out_of_means() -> None:
    found = scores(torch.tensor([[6, 2, 0], [0, 0, 0], [0, 0, 0]]), NAMES)
    assert found["IoU_ground"] == 0.75
    assert found["IoU_red"] == 0  # predicted, though it does not occur
    assert np.isnan(found["IoU_green"])
    assert (found["mIoU"], found["mean_accuracy"], found["pixel_accuracy"]) == (0.375, 0.75, 0.75)


def test_two_processes_evaluate_as_one_does(trained: Path, tmp_path: Path) -> None:
    """Three images, two and one of them."""
    alone, together = validate_alone_and_together(trained, tmp_path, "--trainer.sync_batchnorm", "true")
    [[want], [got]] = metrics(alone), metrics(together)
    assert got == pytest.approx(want)
    assert want["val/mIoU"] > 0.5


def steps(root: Path, folder: Path, number: str, *options: str) -> TaskCLI:
    """A run that ends after so many optimizer steps."""
    more = ["--trainer.max_epochs", "-1", "--trainer.max_steps", number, "--data.batch_size", "2"]
    more += ["--trainer.default_root_dir", str(folder), "--trainer.deterministic", "true"]
    more += ["--model.warmup_steps", "0", "--model.power", "0"]  # or the schedule's end would move
    return fit(root, *more, *options)


@pytest.fixture(scope="module")
def uninterrupted(make_masks: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Weights]:
    """Masks, and the weights after eight steps on them."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    root = make_masks(folder / "masks", train=6)
    return root, {name: one.clone() for name, one in steps(root, folder, "8").model.state_dict().items()}


@pytest.mark.parametrize("first", ["3", "4"])
def test_a_run_resumes_where_it_ended(first: str, uninterrupted: tuple[Path, Weights], tmp_path: Path) -> None:
    """Eight steps at once, or interrupted at the end or in the middle of an epoch of three steps."""
    cli = steps(uninterrupted[0], tmp_path, first)
    assert cli.trainer.global_step == int(first)
    cli = steps(uninterrupted[0], tmp_path, "8", "--ckpt_path", "last")
    assert cli.trainer.global_step == 8
    assert cli.trainer.current_epoch == 3  # two whole ones, and the one that the last step broke off
    want, got = uninterrupted[1], cli.model.state_dict()
    assert want.keys() == got.keys()
    assert [name for name in want if not torch.equal(want[name], got[name])] == []


def test_predictions_are_drawn_and_written(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, photographs, out = (
        trained.parents[1] / "masks" / "images" / "val",
        tmp_path / "photographs",
        tmp_path / "out",
    )
    (photographs / "more").mkdir(parents=True)
    for name, file in (("a.png", "0.png"), ("b.jpg", "1.png"), ("more/a.png", "2.png")):
        Image.open(source / file).save(photographs / name)
    (photographs / "broken.jpg").write_bytes(b"no image")
    command = ["predict", "--ckpt_path", str(trained / "checkpoints" / "last.ckpt"), *QUIET[:4]]
    command += ["--data.predict_path", str(photographs), "--output", str(out), "--data.batch_size", "2"]
    assert main(command) == 1
    assert "broken.jpg cannot be read" in capsys.readouterr().err
    assert main([*command, "--data.on_error", "skip"]) == 0
    assert sorted(str(file.relative_to(out)) for file in out.rglob("*.png")) == [
        "a.png", "a_2.png", "b.png", "ids/a.png", "ids/a_2.png", "ids/b.png",
    ]  # fmt: skip
    model = Segmenter.load_from_checkpoint(trained / "checkpoints" / "last.ckpt", map_location="cpu").eval()
    assert model.classes == NAMES
    with torch.no_grad():
        [want] = model.predict_step([model.read(photographs / "b.jpg")], 0)
    ids = Image.open(out / "ids" / "b.png")
    assert ids.mode == "L"
    assert np.array_equal(np.asarray(ids), want.numpy())
    photograph = np.asarray(Image.open(photographs / "b.jpg")).astype(float)
    picture = np.asarray(Image.open(out / "b.png")).astype(float)
    assert picture.shape[1] == photograph.shape[1]
    assert picture.shape[0] > photograph.shape[0]  # the legend
    colours = np.array(model.palette, float)[want.numpy()]
    assert np.abs(picture[: len(photograph)] - (photograph + colours) / 2).max() <= 1
    legend = {tuple(colour) for colour in picture[len(photograph) :].reshape(-1, 3)}
    assert {model.palette[index] for index in want.unique().tolist()} <= legend


@pytest.mark.parametrize(
    "options", [{"window": (24, 32), "window_stride": (12, 16)}, {"scales": (0.75, 1.0), "flip": True}]
)
def test_other_inference_settings(trained: Path, options: dict[str, Any], caplog: Any) -> None:
    checkpoint, root = trained / "checkpoints" / "last.ckpt", trained.parents[1] / "masks"
    given = [part for name, value in options.items() for part in (f"--model.{name}", json.dumps(value))]
    cli = run(["validate", "-c", str(trained / "config.yaml"), "--ckpt_path", str(checkpoint), *given, *QUIET[:4],
               "--trainer.default_root_dir", str(trained.parent / "again")])  # fmt: skip
    found = float(cli.trainer.callback_metrics["val/mIoU"])
    assert f"mIoU           {100 * found:6.2f}" in caplog.text
    [logged] = [row for row in metrics(trained) if "val/mIoU" in row]
    assert found > 0.3
    assert found != logged["val/mIoU"]
    model = Segmenter.load_from_checkpoint(checkpoint, map_location="cpu", **options).eval()
    image, size = model.read(root / "images" / "val" / "0.png")
    with torch.no_grad():
        assert model.predict_step([(image, size)], 0)[0].shape == size


def test_inference_options_of_predict(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint, photograph = trained / "checkpoints" / "last.ckpt", tmp_path / "0.png"
    Image.open(trained.parents[1] / "masks" / "images" / "val" / "0.png").save(photograph)
    command = ["predict", "--ckpt_path", str(checkpoint), *QUIET[:4], "--data.predict_path", str(photograph)]
    found = []
    for name, given, options in (
        ("plain", [], {}),
        (
            "window",
            ["--window", "24", "--window_stride", "[12, 16]"],  # one number is a square
            {"window": (24, 24), "window_stride": (12, 16)},
        ),
        ("scales", ["--scales", "[0.5]", "--flip", "true"], {"scales": (0.5,), "flip": True}),
    ):
        assert main([*command, "--output", str(tmp_path / name), *given]) == 0
        model = Segmenter.load_from_checkpoint(checkpoint, map_location="cpu", **options).eval()
        with torch.no_grad():
            [want] = model.predict_step([model.read(photograph)], 0)
        found.append(np.asarray(Image.open(tmp_path / name / "ids" / "0.png")))
        assert np.array_equal(found[-1], want.numpy())
    assert not np.array_equal(found[0], found[1])
    assert not np.array_equal(found[0], found[2])
    assert main([*command, "--output", str(tmp_path / "out"), "--window_stride", "[12, 16]"]) == 1
    assert "window_stride needs a window, got (12, 16) without one" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_ends_the_run(make_masks: Callable[..., Path], tmp_path: Path) -> None:
    root = make_masks(tmp_path / "masks")
    options = ["--model.lr", "1e20", "--model.warmup_steps", "0", "--data.batch_size", "2", "--trainer.max_epochs", "2"]
    with pytest.raises(FloatingPointError, match=r"the loss is (nan|inf) \(epoch 0, step 1\)"):
        fit(root, *options, "--trainer.default_root_dir", str(tmp_path))
    assert "pyramid.body.layer4.0.conv2" in (tmp_path / "version_0/diagnosis.txt").read_text()


def test_backbone_weights(tmp_path: Path) -> None:
    import timm

    file = tmp_path / "weights.pt"
    classifier = timm.create_model("rednet26")
    torch.save(classifier.state_dict(), file)
    wanted = classifier.state_dict()
    for name in ("semantic_fpn", "upernet"):
        model = Segmenter(name, 3, "rednet26", backbone_weights=str(file), model_kwargs={"channels": 16})
        body = model.net.body.state_dict()  # type: ignore[union-attr, operator]
        assert all(torch.equal(one, wanted[key]) for key, one in body.items())
        assert model.hparams["backbone_weights"] is None
    with pytest.raises(ValueError, match=r"missing: conv1.* unexpected: stem"):
        Segmenter("upernet", 3, "resnet26_paper", backbone_weights=str(file))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_name": "deeplab"}, "model_name must be one of semantic_fpn, upernet, got 'deeplab'"),
        ({"model_name": "upernet", "neck": "involution"}, "neck must be convolution for upernet, got 'involution'"),
        ({"model_name": "upernet", "scales": ()}, "scales must be positive factors"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Segmenter(num_classes=2, **options)


def test_runs_of_no_known_length(make_masks: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="max_epochs or max_steps must be given"):
        fit(make_masks(tmp_path / "masks"), "--trainer.max_epochs", "-1", "--trainer.max_time", "00:00:00:05",
            "--data.batch_size", "2")  # fmt: skip


def test_photographs_are_not_overwritten(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photograph = tmp_path / "a.png"
    photograph.write_bytes((trained.parents[1] / "masks" / "images" / "val" / "0.png").read_bytes())
    command = ["predict", "--ckpt_path", str(trained / "checkpoints" / "last.ckpt"), *QUIET[:4]]
    assert main([*command, "--data.predict_path", str(photograph), "--output", str(tmp_path)]) == 1
    assert "output must be another folder than the images'" in capsys.readouterr().err


def test_upernet_needs_two_images(tree: Callable[[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    data = ["--data.root", str(tree("cityscapes")), "--data.batch_size", "1", *SMALL]
    assert main(["fit", "-c", "upernet_rednet50_80k", "--model.backbone", "rednet26", *data, *QUIET]) == 1
    assert "batch_size must be at least 2 for upernet" in capsys.readouterr().err


@pytest.mark.parametrize(("crop", "norm", "code"), [(32, "batchnorm", 1), (32, "groupnorm1", 1), (64, "groupnorm1", 0)])
def test_single_images_of_one_pixel_in_the_last_stage(
    crop: int, norm: str, code: int, make_masks: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Batch norms of backbone and decoder alike are refused before the first step."""
    options = ["--data.root", str(make_masks(tmp_path / "masks")), "--data.classes", json.dumps(NAMES), *QUIET]
    options += ["--data.num_workers", "0", "--data.batch_size", "1", "--data.crop", str(crop)]
    options += ["--model.backbone", "rednet26", "--trainer.max_epochs", "1"]
    options += ["--model.backbone_kwargs", json.dumps({"norm_layer": norm})]
    options += ["--trainer.limit_train_batches", "1", "--trainer.limit_val_batches", "0"]
    assert main(["fit", "-c", "masks_rednet50", *options]) == code
    message = "batch_size must be at least 2, or crop larger than 32 pixels, because batch norms at the last stage's"
    assert (message in capsys.readouterr().err) == bool(code)


def test_loss_averages_known_pixels() -> None:
    logits, masks = torch.randn(2, 3, 4, 4), torch.randint(0, 3, (2, 4, 4))
    masks[0, :2] = 255
    known = masks != 255
    want = torch.nn.functional.cross_entropy(logits.movedim(1, -1)[known], masks[known])
    torch.testing.assert_close(pixel_loss(logits, masks), want)
    assert pixel_loss(logits.requires_grad_(), torch.full_like(masks, 255)) == 0


def test_auxiliary_loss_has_its_weight() -> None:
    torch.manual_seed(0)
    model = Segmenter("upernet", 3, "rednet26", auxiliary_weight=0.4, model_kwargs={"channels": 16, "dropout": 0.0})
    images, masks = torch.randn(2, 3, 64, 64), torch.randint(0, 3, (2, 64, 64))
    model.net.auxiliary[3] = torch.nn.Identity()  # type: ignore[index, union-attr]  # its dropout
    logits = model.net(images)
    parts = [pixel_loss(logits[name], masks) for name in ("out", "aux")]
    model.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
    model._trainer = type("Trainer", (), {"optimizers": [type("O", (), {"param_groups": [{"lr": 0.1}]})]})()
    got = model.training_step((list(images), list(masks.byte())), 0)
    torch.testing.assert_close(got, parts[0] + 0.4 * parts[1])


def test_schedule() -> None:
    def rate(step: int, warmup: int = 0) -> float:
        return warmup_poly(step, 80_000, warmup, 0.001, 0.9)

    assert [rate(step) for step in (0, 40_000, 80_000)] == pytest.approx([1, 0.5**0.9, 0])
    assert rate(0, 100) == pytest.approx(0.001)
    assert rate(100, 100) == rate(100)


def test_recipes_are_the_papers() -> None:
    """As published: 80,000 steps of 8 images, crops of 512x1024, lr 0.01, power 0.9, SyncBN."""
    found = {name: yaml.safe_load(file.read_text()) for name, file in RECIPES.items() if name.endswith("_80k")}
    assert set(found) == {
        "semantic_fpn_rednet50_80k",
        "semantic_fpn_rednet50_neck_80k",
        "semantic_fpn_resnet50_80k",
        "upernet_rednet50_80k",
        "upernet_resnet50_80k",
    }
    for name, recipe in found.items():
        model, trainer = recipe["model"]["init_args"], recipe["trainer"]
        assert name.startswith(f"{model['model_name']}_{model['backbone'].removesuffix('c')}")
        assert (model.get("neck") == "involution") == ("_neck" in name)
        assert (model["lr"], model["lr_batch_size"]) == (0.01, 8)
        assert (trainer["max_steps"], trainer["sync_batchnorm"]) == (80_000, True)
        given = {name: value for name, value in recipe["data"]["init_args"].items() if name != "root"}
        [crop] = [step for step in Cityscapes("root", **given)._training.transforms if isinstance(step, RandomCrop)]
        assert (crop.size, crop.max_share) == ((512, 1024), 0.75)  # the share is mmseg's cat_max_ratio
    built = Segmenter("upernet", 19, model_kwargs={"channels": 16})
    assert (built.hparams["power"], built.hparams["auxiliary_weight"], built.hparams["momentum"]) == (0.9, 0.4, 0.9)


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_runs(recipe: str, tree: Callable[[str], Path], tmp_path: Path, caplog: Any) -> None:
    kind = "cityscapes" if recipe.endswith("_80k") else recipe.partition("_")[0]
    small = ["--data.num_workers", "0", "--data.batch_size", "2", "--data.resize", "32", "--data.crop", "[32, 32]"]
    where = ["--data.root", str(tree(kind)), "--trainer.default_root_dir", str(tmp_path)]
    more = ["--data.classes", json.dumps(NAMES)] if kind == "masks" else []
    cli = run(["fit", "-c", recipe, *small, *where, *more, *QUIET[:4], "--trainer.fast_dev_run", "1"])
    assert cli.trainer.global_step == 1
    assert "val/mIoU" in cli.trainer.callback_metrics
    assert "val, percent:" not in caplog.text  # redirected, an epoch is one line
