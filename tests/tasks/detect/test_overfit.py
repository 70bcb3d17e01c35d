"""Every family overfits eight photographs."""

import json
from pathlib import Path

import pytest

from involution.engine.command import run

SHORTEST = 48  # pixels of a box's side: training at a reduced size would lose smaller objects


@pytest.fixture(scope="module")
def eight(data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first eight training photographs of COCO with objects, but without crowds and tiny objects."""
    source = data_folder / "coco482"
    if not source.is_dir():
        pytest.skip(f"no {source}")
    content = json.loads((source / "annotations" / "instances_train2017.json").read_text())
    entries = content["annotations"]
    with_objects = {one["image_id"] for one in entries}
    left_out = {one["image_id"] for one in entries if one["iscrowd"] or min(one["bbox"][2:]) < SHORTEST}
    content["images"] = [image for image in content["images"] if image["id"] in with_objects - left_out][:8]
    kept = {image["id"] for image in content["images"]}
    content["annotations"] = [one for one in entries if one["image_id"] in kept]
    root = tmp_path_factory.mktemp("eight")
    (root / "annotations").mkdir()
    (root / "annotations" / "instances_eight.json").write_text(json.dumps(content))
    (root / "eight").symlink_to((source / "train2017").resolve())
    return root


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "minima"),
    [
        ("faster_rcnn_rednet50_neck_head_fpn_1x", {"val/box_AP50": 0.90}),
        ("mask_rcnn_rednet50_neck_head_fpn_1x", {"val/box_AP50": 0.90, "val/mask_AP50": 0.85}),
        ("retinanet_rednet50_neck_fpn_1x", {"val/box_AP50": 0.90}),
    ],
)
def test_overfits_eight_photographs(recipe: str, minima: dict[str, float], eight: Path, tmp_path: Path) -> None:
    """RedNet-26 from scratch, evaluated on its training images; minutes each."""
    data = ["--data.train", "eight", "--data.val", "eight", "--data.flip", "0", "--data.batch_size", "4"]
    data += ["--data.root", str(eight), "--data.min_size", "192", "--data.max_size", "288", "--data.num_workers", "0"]
    model = ["--model.backbone", "rednet26", "--model.backbone_kwargs", '{"norm_layer": "groupnorm1"}']
    model += ["--model.lr", "0.02", "--model.lr_batch_size", "null", "--model.warmup_steps", "20"]
    # From scratch RetinaNet's head hardly learns without norms. Few regions, which take most of the others' time.
    head = {"head_norm_groups": 32} if recipe.startswith("retinanet") else {"box_batch_size_per_image": 64}
    model += ["--model.model_kwargs", json.dumps(head)]
    trainer = ["--trainer.accelerator", "cpu", "--trainer.max_epochs", "100", "--trainer.check_val_every_n_epoch", "50"]
    trainer += ["--model.milestones", "[80]", "--trainer.num_sanity_val_steps", "0"]
    trainer += ["--trainer.enable_progress_bar", "false", "--trainer.default_root_dir", str(tmp_path)]
    cli = run(["fit", "-c", recipe, *data, *model, *trainer])
    found = {name: float(cli.trainer.callback_metrics[name]) for name in minima}
    print(found)
    assert all(found[name] >= minimum for name, minimum in minima.items()), found
