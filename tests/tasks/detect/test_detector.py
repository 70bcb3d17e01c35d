"""Training, evaluating and predicting with detectors, through the command line."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from command_line import QUIET, metrics, validate_alone_and_together
from PIL import Image
from pycocotools.coco import COCO as TheirCOCO
from small_detectors import FEW, NARROW

from involution.cli import main
from involution.engine.command import TaskCLI, run
from involution.engine.recipes import recipes
from involution.tasks.detect import Detector
from involution.tasks.detect.module import warmup_steps_down

BACKBONE = ["--model.backbone", "rednet26", "--model.backbone_kwargs", json.dumps(NARROW)]


def sizes(root: Path, shorter: int) -> list[str]:
    longer = str(round(4 / 3 * shorter))
    return [
        "--data.root",
        str(root),
        "--data.num_workers",
        "0",
        "--data.min_size",
        str(shorter),
        "--data.max_size",
        longer,
    ]


def fit(recipe: str, root: Path, shorter: int, *options: str) -> TaskCLI:
    return run(["fit", "-c", recipe, *sizes(root, shorter), *BACKBONE, *QUIET, *options])


@pytest.fixture(scope="module")
def trained(make_coco: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run's folder of a Mask R-CNN that has begun to learn the rectangles."""
    root = make_coco(tmp_path_factory.mktemp("trained") / "coco", repeats=4)
    options = ["--model.lr_batch_size", "null", "--model.warmup_steps", "10", "--data.batch_size", "3"]
    options += ["--model.lr", "0.01", "--trainer.gradient_clip_val", "1"]
    options += ["--model.model_kwargs", json.dumps(FEW), "--trainer.default_root_dir", str(root.parent / "runs")]
    options += [
        "--trainer.max_epochs",
        "5",
        "--trainer.check_val_every_n_epoch",
        "5",
        "--trainer.log_every_n_steps",
        "2",
    ]
    cli = fit("mask_rcnn_rednet50_neck_head_fpn_1x", root, 72, *options)
    return Path(str(cli.trainer.log_dir))


def test_a_run_logs_losses_and_cocos_numbers(trained: Path) -> None:
    rows = metrics(trained)
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    assert len(losses) == 20  # 24 of the 28 images hold objects: 8 batches an epoch, every other one logged
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])
    parts = {name for row in rows for name in row if name.startswith("train/")} - {"train/loss", "train/seconds"}
    assert parts == {f"train/{part}" for part in ("classifier", "box_reg", "mask", "objectness", "rpn_box_reg")}
    last = next(row for row in rows if "val/box_AP" in row)
    assert len([name for name in last if name.startswith("val/")]) == 24
    assert last["val/box_AP50"] > 0
    assert last["val/mask_AP50"] > 0
    assert last["val/box_APl"] == -1  # there is no large object


def test_results_are_in_cocos_format(trained: Path) -> None:
    truth = TheirCOCO(str(trained.parents[1] / "coco" / "annotations" / "instances_val2017.json"))
    for kind in ("bbox", "segm"):
        results = json.loads((trained / f"val.{kind}.json").read_text())
        assert results
        assert len(truth.loadRes(results).getAnnIds()) == len(results)
        assert {one["category_id"] for one in results} <= {3, 7}


def test_two_processes_evaluate_as_one_does(trained: Path, tmp_path: Path) -> None:
    """Seven images, four in one process and three in the other: the same detections, the same numbers."""
    alone, together = validate_alone_and_together(trained, tmp_path)
    [[want], [got]] = metrics(alone), metrics(together)
    assert got == want
    assert want["val/box_AP50"] > 0
    for kind in ("bbox", "segm"):
        ours, theirs = (json.loads((folder / f"val.{kind}.json").read_text()) for folder in (together, alone))
        key = json.dumps
        assert sorted(ours, key=key) == sorted(theirs, key=key)


def test_a_run_resumes_bit_exactly(coco_folder: Path, tmp_path: Path) -> None:
    """Two epochs in one run, or one epoch and another from its checkpoint: the same weights."""
    options = ["--model.milestones", "[1]", "--data.batch_size", "3", "--trainer.deterministic", "true"]
    options += ["--model.lr", "0.01", "--model.warmup_steps", "3", "--model.lr_batch_size", "null"]
    weights = []
    for folder, parts in ((tmp_path / "whole", ["2"]), (tmp_path / "halves", ["1", "2"])):
        for epochs in parts:
            last = ["--ckpt_path", "last"] if len(parts) == 2 and epochs == "2" else []
            more = ["--trainer.max_epochs", epochs, "--trainer.default_root_dir", str(folder), *last]
            cli = fit("retinanet_rednet50_neck_fpn_1x", coco_folder, 48, *options, *more)
        weights.append(cli.model.state_dict())
        rates = [group["lr"] for group in cli.trainer.optimizers[0].param_groups]
        assert rates == pytest.approx([0.001])  # a tenth, after the milestone
    assert [name for name in weights[0] if not torch.equal(weights[0][name], weights[1][name])] == []


def predict(checkpoint: Path, path: Path, output: Path, *options: str) -> int:
    where = ["--ckpt_path", str(checkpoint), "--data.predict_path", str(path), "--output", str(output)]
    return main(["predict", *where, *QUIET[:4], *options])


def test_predictions_are_drawn_and_written(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint, photographs = trained / "checkpoints" / "last.ckpt", tmp_path / "photographs"
    (photographs / "more").mkdir(parents=True)
    source = trained.parents[1] / "coco" / "val2017"
    for name, file in (("a.png", "1.png"), ("b.png", "4.png"), ("more/a.png", "0.png")):
        Image.open(source / file).save(photographs / name)
    (photographs / "broken.jpg").write_bytes(b"no image")
    out = tmp_path / "out"
    assert predict(checkpoint, photographs, out) == 1
    assert "broken.jpg cannot be read" in capsys.readouterr().err
    threshold = ["--score_threshold", "0.1"]
    assert predict(checkpoint, photographs, out, "--data.on_error", "skip", "--data.batch_size", "2", *threshold) == 0
    written = TheirCOCO(str(out / "predictions.json"))
    assert [image["file_name"] for image in written.dataset["images"]] == [
        str(photographs / name) for name in ("a.png", "b.png", "more/a.png")
    ]
    assert [image["picture"] for image in written.dataset["images"]] == ["a.png", "b.png", "a_2.png"]
    assert [one["name"] for one in written.dataset["categories"]] == ["cat", "dog"]
    assert sorted(file.name for file in out.iterdir()) == ["a.png", "a_2.png", "b.png", "predictions.json"]
    model = Detector.load_from_checkpoint(checkpoint, map_location="cpu").eval()
    assert (model.classes, model.preprocessing.min_size) == (["cat", "dog"], 72)
    with torch.no_grad():
        [found] = model([model.read(photographs / "b.png")])
    ours = written.loadAnns(written.getAnnIds(imgIds=[2]))
    assert len(ours) == len(found["scores"]) > 0
    assert [one["score"] for one in ours] == pytest.approx(found["scores"].tolist(), abs=1e-5)
    boxes = found["boxes"].clone()
    boxes[:, 2:] -= boxes[:, :2]
    assert [one["bbox"] for one in ours] == [pytest.approx(box, abs=1e-3) for box in boxes.tolist()]
    assert written.annToMask(ours[0]).sum() == (found["masks"][0, 0] > 0.5).sum()
    picture, original = Image.open(out / "b.png"), Image.open(photographs / "b.png")
    assert picture.size == original.size
    drawn = (found["scores"] >= 0.1).any()
    assert drawn
    assert picture.tobytes() != original.tobytes()
    assert predict(checkpoint, photographs / "b.png", tmp_path / "none", "--score_threshold", "1.0") == 0
    assert Image.open(tmp_path / "none" / "b.png").tobytes() == original.tobytes()


def test_a_loss_that_is_not_finite_ends_the_run(coco_folder: Path, tmp_path: Path) -> None:
    options = ["--model.lr", "1e20", "--model.warmup_steps", "0", "--data.batch_size", "2", "--trainer.max_epochs", "2"]
    options += ["--model.model_kwargs", json.dumps(FEW), "--trainer.default_root_dir", str(tmp_path)]
    with pytest.raises(FloatingPointError, match=r"the loss is (nan|inf) \(epoch 0, step 1\)"):
        fit("faster_rcnn_rednet50_neck_fpn_1x", coco_folder, 48, *options)
    assert "backbone.body.layer4.0.conv2" in (tmp_path / "version_0/diagnosis.txt").read_text()


def test_backbone_weights(coco_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A classifier's checkpoint fills the backbone, whose stem, first stage and statistics are then frozen."""
    from involution.tasks.classify import Classifier

    narrow = {name: NARROW[name] for name in ("layers", "channels")}
    classifier = Classifier("rednet26", 5, model_kwargs=narrow)
    with torch.no_grad():
        for buffer in classifier.buffers():
            buffer.add_(torch.rand_like(buffer)) if buffer.is_floating_point() else None
    file = tmp_path / "classifier.ckpt"
    torch.save({"state_dict": classifier.state_dict()}, file)
    options: dict[str, Any] = {"num_classes": 2, "backbone": "rednet26", "backbone_kwargs": narrow}
    model = Detector("retinanet", backbone_weights=str(file), **options).train()
    body = model.net.backbone.body
    wanted = classifier.net.state_dict()
    assert all(torch.equal(one, wanted[name]) for name, one in body.state_dict().items())
    assert not any(p.requires_grad for p in [*body.stem.parameters(), *body.layer1.parameters()])
    assert all(p.requires_grad for p in body.layer2.parameters())
    assert not any(m.training for m in body.modules() if isinstance(m, torch.nn.BatchNorm2d))
    scratch = Detector("retinanet", **options).train()
    assert all(p.requires_grad for p in scratch.parameters())
    assert all(m.training for m in scratch.modules())
    # From the command line; loading the checkpoint does not need the file any more.
    given = ["--model.backbone_weights", str(file), "--trainer.fast_dev_run", "1", "--data.batch_size", "2"]
    recipe = ["-c", "retinanet_rednet50_fpn_1x", "--model.backbone", "rednet26", *sizes(coco_folder, 48), *QUIET]
    recipe += ["--model.backbone_kwargs", json.dumps(narrow)]
    cli = run(["fit", *recipe, *given])
    assert "Average Precision" not in capsys.readouterr().out  # redirected, an epoch is one line
    assert torch.equal(cli.model.net.backbone.body.stem.conv1.weight, wanted["stem.conv1.weight"])
    saved = tmp_path / "detector.ckpt"
    cli.trainer.save_checkpoint(saved)
    file.unlink()
    again = Detector.load_from_checkpoint(saved, map_location="cpu")
    assert torch.equal(
        again.net.backbone.body.layer2[0].conv1.weight, cli.model.net.backbone.body.layer2[0].conv1.weight
    )
    # A resumed run freezes the same stages; other backbone_weights are refused.
    assert not any(parameter.requires_grad for parameter in again.net.backbone.body.stem.parameters())
    assert not any(m.training for m in again.train().net.backbone.body.modules() if isinstance(m, torch.nn.BatchNorm2d))
    resumed = ["fit", *recipe, "--ckpt_path", str(saved), "--trainer.max_epochs", "1", "--data.batch_size", "2"]
    model = run([*resumed, "--model.backbone_weights", str(file)]).model
    assert not any(parameter.requires_grad for parameter in model.net.backbone.body.stem.parameters())
    with pytest.raises(ValueError, match=r"backbone_weights must be '.*classifier.ckpt', .* began, .* got 'other.pt'"):
        run([*resumed, "--model.backbone_weights", "other.pt"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "weights must be a file, got"),
        ("no weights", "weights must be a checkpoint or a state dict, got .*: "),
        ({"epoch": 3}, "which contains something else"),
        ("rednet38", "of the backbone, rednet26, got .* of rednet38: unexpected: layer1.1.conv1.weight, .* more"),
        ("rednetv2_26", "of the backbone, rednet26, got .* of rednetv2_26: missing: stem"),
        ("resnet26_paper", "of resnet26_paper: missing: stem.* unexpected: "),
        ("unnamed", "of the backbone, rednet26, got .* of a network that it does not name: .* unexpected: "),
        ("stem 7", r"of another shape: stem\..* \[98, 8, 1, 1\] for \[18, 8, 1, 1\]"),
    ],
)
def test_backbone_weights_that_do_not_fit(content: Any, message: str, tmp_path: Path) -> None:
    import timm

    file, narrow = tmp_path / "weights.pt", {"channels": NARROW["channels"]}
    if content == "no weights":
        file.write_text(content)
    elif content == "stem 7":
        torch.save(timm.create_model("rednet26", stem_kernel_size=7, **narrow).state_dict(), file)
    elif content == "unnamed":
        torch.save(timm.create_model("resnet26_paper", **narrow).state_dict(), file)
    elif isinstance(content, str):
        weights = {f"net.{name}": one for name, one in timm.create_model(content, **narrow).state_dict().items()}
        torch.save({"state_dict": weights, "hyper_parameters": {"model_name": content}}, file)
    elif content is not None:
        torch.save(content, file)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        Detector("retinanet", 2, "rednet26", backbone_weights=str(file), backbone_kwargs=narrow)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_name": "yolo"}, "model_name must be one of faster_rcnn, mask_rcnn, retinanet, got 'yolo'"),
        ({"model_name": "retinanet", "head": "involution"}, "head must be convolution for retinanet, got 'involution'"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Detector(num_classes=2, **options)


@pytest.mark.parametrize("verb", ["fit", "validate", "test"])
def test_masks_must_be_read(verb: str, coco_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The error comes before the first image, in every stage."""
    command = [verb, "-c", "mask_rcnn_rednet50_fpn_1x", *sizes(coco_folder, 48), "--data.masks", "false", *QUIET]
    assert main([*command, *BACKBONE]) == 1
    assert "masks must be true in the data of a model that predicts masks, got false" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["fit", "validate", "test"])
def test_a_file_of_boxes_alone_names_another_recipe(
    verb: str, make_coco: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The error comes before training, although the recipe has on_error: skip."""
    root = make_coco(tmp_path / "coco")
    for file in (root / "annotations").iterdir():
        content = json.loads(file.read_text())
        for one in content["annotations"]:
            one["segmentation"] = []
        file.write_text(json.dumps(content))
    command = [verb, "-c", "mask_rcnn_rednet50_fpn_1x", *sizes(root, 48), *QUIET, *BACKBONE]
    assert main(command) == 1
    message = capsys.readouterr().err
    assert "an object must have a segmentation, because data.masks is true, got 10 boxes without" in message
    assert "faster_rcnn_rednetv2_50_fpn is a recipe for boxes" in message


def test_schedule() -> None:
    def rate(step: int) -> float:
        return warmup_steps_down(step, 4, 0.001, (8, 11), 10)

    assert [rate(step) for step in (0, 2, 4, 79)] == pytest.approx([0.001, 0.5005, 1, 1])
    assert [rate(step) for step in (80, 109, 110, 500)] == pytest.approx([0.1, 0.1, 0.01, 0.01])


def test_recipes_are_the_papers() -> None:
    """The published combinations, their schedule, and where gradients are clipped."""
    found = {name: yaml.safe_load(file.read_text()) for name, file in recipes().items() if name.endswith("_fpn_1x")}
    clips = {name: recipe["trainer"].get("gradient_clip_val") for name, recipe in found.items()}
    assert clips == {
        "faster_rcnn_rednet50_fpn_1x": None,
        "faster_rcnn_rednet50_neck_fpn_1x": None,
        "faster_rcnn_rednet50_neck_head_fpn_1x": 5,
        "faster_rcnn_resnet50_fpn_1x": None,
        "mask_rcnn_rednet50_fpn_1x": None,
        "mask_rcnn_rednet50_neck_fpn_1x": None,
        "mask_rcnn_rednet50_neck_head_fpn_1x": 5,
        "mask_rcnn_resnet50_fpn_1x": None,
        "retinanet_rednet50_fpn_1x": None,
        "retinanet_rednet50_neck_fpn_1x": 40,
        "retinanet_resnet50_fpn_1x": None,
    }
    for name, recipe in found.items():
        model, data = recipe["model"]["init_args"], recipe["data"]["init_args"]
        assert name.startswith(f"{model['model_name']}_{model['backbone']}")
        assert (model.get("neck") == "involution") == ("_neck" in name)
        assert (model.get("head") == "involution") == ("_head" in name)
        assert model["lr"] == (0.01 if name.startswith("retinanet") else 0.02)
        assert model["warmup_steps"] == (2000 if name.startswith("retinanet") or "_neck" in name else 500)
        assert (model["lr_batch_size"], model["milestones"]) == (16, [8, 11])
        given = Detector(num_classes=80, **(model | {"backbone": "rednet26", "backbone_kwargs": NARROW})).hparams
        assert (given["momentum"], given["weight_decay"], given["warmup_ratio"]) == (0.9, 1e-4, 0.001)
        assert (given["frozen_stages"], given["norm_eval"]) == (1, True)
        assert recipe["trainer"]["max_epochs"] == 12
        assert data.get("masks", False) == name.startswith("mask")


@pytest.mark.parametrize("family", ["faster_rcnn", "mask_rcnn", "retinanet"])
def test_recipes_for_own_data(family: str) -> None:
    """docs/detection.md's second table: RedNetV2 from scratch with group norms, several scales, clipping."""
    recipe = yaml.safe_load(recipes()[f"{family}_rednetv2_50_fpn"].read_text())
    model, data = recipe["model"]["init_args"], recipe["data"]["init_args"]
    assert (model["model_name"], model["backbone"], "backbone_weights" in model) == (family, "rednetv2_50", False)
    assert model["backbone_kwargs"] == {"norm_layer": "groupnorm1"}
    assert model.get("model_kwargs") == ({"head_norm_groups": 32} if family == "retinanet" else None)
    assert model["lr"] == (0.01 if family == "retinanet" else 0.02)
    assert (model["lr_batch_size"], model["warmup_steps"]) == (16, 300)
    epochs = recipe["trainer"]["max_epochs"]
    assert model["milestones"] == [epochs * 2 // 3, epochs * 11 // 12]
    assert recipe["trainer"]["gradient_clip_val"] == 10
    assert len(data["train_min_sizes"]) > 1
    assert data.get("masks", False) == (family == "mask_rcnn")
    assert data["on_error"] == "skip"
    small = {"backbone": "rednetv2_26", "backbone_kwargs": NARROW | model["backbone_kwargs"]}
    network = Detector(num_classes=2, **(model | small)).net.backbone.body
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in network.modules())


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [name for name, file in recipes().items() if file.parts[-3] == "detect"])
def test_every_recipe_runs(recipe: str, coco_folder: Path) -> None:
    run(["fit", "-c", recipe, *sizes(coco_folder, 64), *QUIET, "--trainer.fast_dev_run", "1"])
