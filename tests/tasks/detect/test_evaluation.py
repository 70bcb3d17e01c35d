"""Average precision equals pycocotools'."""

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools import mask as tools
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from involution.tasks.detect.annotations import Annotations, read_annotations
from involution.tasks.detect.annotations.run_lengths import runs_of
from involution.tasks.detect.evaluation import KINDS, NUMBERS, average_precision, detections, ground_truth


@pytest.fixture(scope="module")
def annotations(data_folder: Path) -> Annotations:
    root = data_folder / "coco482"
    if not root.is_dir():
        pytest.skip(f"no {root}")
    return read_annotations(root / "annotations" / "instances_val2017.json", root / "val2017", masks=True)


def theirs(truth: dict[str, Any], results: list[dict[str, Any]], kind: str, images: list[int]) -> dict[str, float]:
    with contextlib.redirect_stdout(io.StringIO()):
        expected = COCO()
        expected.dataset = json.loads(json.dumps(truth))
        expected.createIndex()
        evaluation = COCOeval(expected, expected.loadRes(json.loads(json.dumps(results))), KINDS[kind])
        evaluation.params.imgIds = images
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return dict(zip(NUMBERS, evaluation.stats.tolist(), strict=True))


def noisy(annotations: Annotations, seed: int) -> list[dict[str, Any]]:
    """Detections a little off the objects, some twice, some of another category, some missing; scores have ties."""
    random = np.random.default_rng(seed)
    categories = list(annotations.categories)
    results = []
    for image in annotations.images:
        for one in annotations.objects[image.id]:
            for _ in range(random.integers(0, 3)):
                left, top, width, height = one.box
                scale = random.lognormal(0, 0.15, 2)
                moved = random.normal(0, 0.08, 2) * (width, height)
                box = [left + moved[0], top + moved[1], width * scale[0], height * scale[1]]
                category = one.category if random.random() < 0.8 else int(random.choice(categories))
                runs = runs_of(one, (image.height, image.width))
                score = round(float(random.random()), 2)
                found = {"image_id": image.id, "category_id": category, "score": score}
                results.append({**found, "bbox": box, "segmentation": runs})
    return results


@pytest.mark.parametrize("kind", ["box", "mask"])
@pytest.mark.parametrize("images", [188, 20])
def test_the_twelve_numbers_are_pycocotools(annotations: Annotations, kind: str, images: int) -> None:
    field = {"box": "bbox", "mask": "segmentation"}[kind]
    results = [
        {name: one[name] for name in ("image_id", "category_id", "score", field)} for one in noisy(annotations, 0)
    ]
    truth = ground_truth(annotations)
    ids = [image.id for image in annotations.images][:images]
    ours, summary = average_precision(truth, results, kind, ids)
    want = theirs(truth, results, kind, ids)
    assert ours == pytest.approx(want, abs=1e-6)
    assert 0.1 < ours["AP"] < 0.9
    assert len(summary) == 12
    assert summary[0].startswith(" Average Precision  (AP) @[ IoU=0.50:0.95 | area=   all | maxDets=100 ] = 0.")


@pytest.mark.parametrize("kind", ["box", "mask"])
def test_perfect_detections(annotations: Annotations, kind: str) -> None:
    results = []
    for image in annotations.images:
        for one in annotations.objects[image.id]:
            if not one.crowd:
                found = {"image_id": image.id, "category_id": one.category, "score": 0.9}
                shape = {"bbox": list(one.box)} if kind == "box" else {}
                if kind == "mask":
                    shape = {"segmentation": runs_of(one, (image.height, image.width))}
                results.append(found | shape)
    numbers, _ = average_precision(ground_truth(annotations), results, kind, [one.id for one in annotations.images])
    for name in ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR100"):
        assert numbers[name] == pytest.approx(1.0, abs=1e-9), name
    nothing, _ = average_precision(ground_truth(annotations), [], kind, [one.id for one in annotations.images])
    assert nothing["AP"] == 0


def test_numbers_without_objects_are_minus_one(annotations: Annotations) -> None:
    empty = annotations._replace(objects={image.id: [] for image in annotations.images})
    numbers, _ = average_precision(ground_truth(empty), [], "box", [one.id for one in empty.images])
    assert set(numbers.values()) == {-1.0}


def test_detections_are_json() -> None:
    masks = torch.zeros(2, 1, 6, 8)
    masks[0, 0, 1:4, 2:7] = 0.9
    masks[1] = 0.4
    found = detections(
        {
            "boxes": torch.tensor([[2.0, 1.0, 7.0, 4.0], [0.0, 0.0, 8.0, 6.0]]),
            "labels": torch.tensor([3, 1]),
            "scores": torch.tensor([0.75, 0.5], dtype=torch.bfloat16),
            "masks": masks,
        }
    )
    assert [one["label"] for one in found] == [3, 1]
    assert [one["score"] for one in found] == [0.75, 0.5]
    assert [one["bbox"] for one in found] == [[2, 1, 5, 3], [0, 0, 8, 6]]
    assert json.loads(json.dumps(found)) == found

    assert [tools.area(one["segmentation"]) for one in found] == [15, 0]
    assert tools.toBbox(found[0]["segmentation"]).tolist() == [2, 1, 5, 3]


def small() -> dict[str, Any]:
    """What labelling tools write: ids from 0, boxes over the edge, a box without area, a crowd."""
    content: dict[str, Any] = {
        "images": [{"id": number, "file_name": f"{number}.png", "width": 60, "height": 50} for number in (1, 2, 3)],
        "categories": [{"id": number, "name": str(number)} for number in range(2)],
        "annotations": [],
    }
    boxes = [[-4, 5, 30, 20], [20, 20, 20, 20], [5, 5, 0, 8], [30, 30, 40, 40], [8, 9, 12, 15], [0, 0, 60, 25]]
    for number, (left, top, width, height) in enumerate(boxes):
        corners = [left, top, left + width, top, left + width, top + height, left, top + height]
        entry = {"id": number, "image_id": 1 + number // 2, "category_id": number % 2, "area": width * height}
        entry |= {"bbox": [left, top, width, height], "iscrowd": int(number == 5), "segmentation": [corners]}
        content["annotations"].append(entry)
    return content


def written(content: dict[str, Any], folder: Path) -> Path:
    for image in content["images"]:
        (folder / image["file_name"]).touch()
    (folder / "all.json").write_text(json.dumps(content))
    return folder / "all.json"


def results_of(content: dict[str, Any], missed: int) -> list[dict[str, Any]]:
    kept = [one for number, one in enumerate(content["annotations"]) if number != missed]
    return [{name: one[name] for name in ("image_id", "category_id", "bbox")} | {"score": 0.9} for one in kept]


@pytest.mark.parametrize("missed", range(6))
def test_the_numbers_are_pycocotools_of_the_users_own_file(missed: int, tmp_path: Path) -> None:
    """Only ids are shifted for pycocotools, which treats an object of the id 0 as unmatched."""
    content = small()
    with pytest.warns(RuntimeWarning, match="evaluated 3 objects as they are"):
        found = read_annotations(written(content, tmp_path), tmp_path, on_error="skip", evaluation=True)
    results = results_of(content, missed)
    ours, _ = average_precision(ground_truth(found), results, "box", [1, 2, 3])
    for one in content["annotations"]:
        one["id"] += 1
    assert ours == pytest.approx(theirs(content, results, "box", [1, 2, 3]), abs=1e-9)


def test_the_first_annotation_may_have_the_id_0(tmp_path: Path) -> None:
    content = small()
    content["annotations"] = [content["annotations"][number] for number in (1, 4)]
    for first in (0, 1):
        for number, one in enumerate(content["annotations"]):
            one["id"] = first + number
        found = read_annotations(written(content, tmp_path), tmp_path, evaluation=True)
        ours, _ = average_precision(ground_truth(found), results_of(content, -1), "box", [1, 2, 3])
        assert (ours["AP"], ours["AR100"]) == (1, 1)


def test_an_object_without_a_mask_counts_for_boxes_and_is_ignored_for_masks(tmp_path: Path) -> None:
    content = small()
    content["annotations"] = [content["annotations"][number] for number in (1, 4)]
    content["annotations"][1]["category_id"] = 1
    content["annotations"][0]["segmentation"] = []
    with pytest.warns(RuntimeWarning, match=r"evaluated 1 objects as they are.*segmentation must be there"):
        found = read_annotations(written(content, tmp_path), tmp_path, True, "skip", evaluation=True)
    truth = ground_truth(found)
    assert average_precision(truth, results_of(content, -1), "box", [1, 2, 3])[0]["AP"] == 1
    masks = [
        {"image_id": entry.id, "category_id": one.category, "segmentation": runs_of(one, (50, 60)), "score": 0.9}
        for entry in found.images
        for one in found.objects[entry.id]
        if one.segmentation is not None
    ]
    in_its_box = np.zeros((50, 60), np.uint8, order="F")
    in_its_box[22:38, 22:38] = 1
    first = {"image_id": 1, "category_id": 1, "segmentation": tools.encode(in_its_box), "score": 0.95}
    assert average_precision(truth, [first, *masks], "mask", [1, 2, 3])[0]["AP"] == 1
