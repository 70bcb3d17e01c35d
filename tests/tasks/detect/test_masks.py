"""Targets and pasting of masks: ideal targets of synthetic and of real shapes, pasted, give the shapes again."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from faster_coco_eval.core import mask as run_lengths
from torch.nn import functional as F
from torchvision.models.detection.roi_heads import paste_masks_in_image
from torchvision.ops import roi_align

from involution.tasks.detect import masks as module
from involution.tasks.detect.annotations import Annotations, read_annotations
from involution.tasks.detect.annotations.run_lengths import mask_of
from involution.tasks.detect.evaluation import as_results, average_precision, detections, ground_truth
from involution.tasks.detect.masks import mask_targets, paste_masks

Shape = tuple[torch.Tensor, list[float]]  # mask [H, W], and its box: left, top, width, height


def ellipses(count: int, height: int, width: int) -> Iterator[Shape]:
    """Rotated ellipses of all sizes with their exact sub-pixel boxes."""
    random = np.random.default_rng(0)
    rows, columns = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    while count:
        x, y, angle = random.uniform((0, 0, 0), (width, height, 3.1))
        long, short = random.uniform(7, 90), random.uniform(7, 40)
        cos, sin = np.cos(angle), np.sin(angle)
        across, down = np.hypot(long * cos, short * sin), np.hypot(long * sin, short * cos)
        if not (across < x < width - across and down < y < height - down):
            continue
        along = ((columns - x) * cos + (rows - y) * sin) / long
        aside = ((rows - y) * cos - (columns - x) * sin) / short
        yield (along**2 + aside**2 < 1).byte(), [x - across, y - down, 2 * across, 2 * down]
        count -= 1


def mask_precision(truth: dict[str, Any], found: dict[int, list[Any]]) -> float:
    categories = [one["id"] for one in truth["categories"]]
    results = [one for image, objects in found.items() for one in as_results(image, objects, categories, "mask")]
    return average_precision(truth, results, "mask", found)[0]["AP"]


def ideal(masks: torch.Tensor, boxes: torch.Tensor, size: tuple[int, int], paste: Any) -> list[Any]:
    """The detections of an ideal detector: each 28x28 output is the fraction of the cell that the object covers."""
    regions = torch.cat([torch.arange(len(boxes))[:, None], boxes], dim=1)
    pasted = paste(roi_align(masks[:, None].float(), regions, 28, aligned=True), boxes, size)
    labels, scores = torch.ones(len(boxes), dtype=torch.int64), torch.full((len(boxes),), 0.9)
    return detections({"boxes": boxes, "labels": labels, "scores": scores, "masks": pasted})


def test_ideal_targets_of_ellipses() -> None:
    truth: dict[str, Any] = {"images": [], "categories": [{"id": 1, "name": "ellipse"}], "annotations": []}
    ours, theirs = {}, {}
    for number, (mask, box) in enumerate(ellipses(30, 200, 320), start=1):
        truth["images"].append({"id": number, "width": 320, "height": 200})
        runs = run_lengths.encode(np.asfortranarray(mask.numpy()))
        shape = {"size": runs["size"], "counts": runs["counts"]}
        entry = {"id": number, "image_id": number, "category_id": 1, "bbox": box, "segmentation": shape}
        truth["annotations"].append({**entry, "area": float(mask.sum()), "iscrowd": 0})
        corners = torch.tensor([[box[0], box[1], box[0] + box[2], box[1] + box[3]]], dtype=torch.float32)
        ours[number] = ideal(mask[None], corners, (200, 320), paste_masks)
        theirs[number] = ideal(mask[None], corners, (200, 320), paste_masks_in_image)
    assert mask_precision(truth, ours) >= 0.99
    assert mask_precision(truth, theirs) < 0.98  # torchvision's truncates boxes to whole pixels


@pytest.fixture(scope="module")
def photographs(data_folder: Path) -> Annotations:
    root = data_folder / "coco482"
    if not root.is_dir():
        pytest.skip(f"no {root}")
    found = read_annotations(root / "annotations" / "instances_val2017.json", root / "val2017", masks=True)
    images = found.images[:60]
    plain = {image.id: [one for one in found.objects[image.id] if not one.crowd] for image in images}
    return found._replace(images=images, objects=plain)


def test_ideal_targets_of_photographs(photographs: Annotations) -> None:
    truth, found = ground_truth(photographs), {}
    for image in photographs.images:
        objects = photographs.objects[image.id]
        if not objects:
            continue
        size = (image.height, image.width)
        shapes = torch.stack([torch.from_numpy(mask_of(one, size)) for one in objects])
        found[image.id] = ideal(shapes, torch.tensor([one.corners for one in objects]).float(), size, paste_masks)
        labels = list(photographs.categories)
        for one, entry in zip(found[image.id], objects, strict=True):
            one["label"] = 1 + labels.index(entry.category)
    results = [one for image, objects in found.items() for one in as_results(image, objects, labels, "mask")]
    numbers, _ = average_precision(truth, results, "mask", found)
    assert numbers["AP"] >= 0.99
    assert numbers["APs"] >= 0.99


def test_pasting_sets_the_pixels_whose_centre_is_inside() -> None:
    [pasted] = paste_masks(torch.ones(1, 1, 28, 28), torch.tensor([[2.4, 1.6, 6.6, 4.6]]), (8, 10))
    want = torch.zeros(8, 10, dtype=torch.bool)
    want[2:5, 2:7] = True
    assert pasted.dtype == torch.bool
    assert torch.equal(pasted[0], want)


@pytest.mark.parametrize("box", [[-3.5, -2.5, 30.2, 20.2], [20.0, 3.0, 20.0, 9.0], [30.0, 3.0, 40.0, 9.0]])
def test_boxes_over_the_edge_without_width_and_outside(box: list[float]) -> None:
    pasted = paste_masks(torch.ones(1, 1, 28, 28), torch.tensor([box]), (12, 24))
    assert pasted.shape == (1, 1, 12, 24)
    assert pasted.float().mean() == (1 if box[0] < 0 else 0)
    assert paste_masks(torch.ones(0, 1, 28, 28), torch.zeros(0, 4), (12, 24)).shape == (0, 1, 12, 24)


def test_memory_of_pasting_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """At most a chunk of pixels is sampled at a time, and chunks do not change the result."""
    sampled = []

    def sample(mask: torch.Tensor, grid: torch.Tensor, **options: Any) -> torch.Tensor:
        sampled.append(grid.shape[1] * grid.shape[2])
        return F.grid_sample(mask, grid, **options)

    outputs = torch.rand(3, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    boxes = torch.tensor([[0.0, 0.0, 300.0, 200.0], [3.3, 7.1, 250.9, 190.2], [10.0, 10.0, 20.0, 30.0]])
    whole = paste_masks(outputs, boxes, (200, 300))
    monkeypatch.setattr(module, "F", type("Functional", (), {"grid_sample": staticmethod(sample)}))
    assert torch.equal(paste_masks(outputs, boxes, (200, 300), chunk=4096), whole)
    assert max(sampled) <= 4096
    assert sum(sampled) <= 300 * 200 + 248 * 184 + 10 * 20


def test_targets_are_binary() -> None:
    mask = torch.zeros(1, 40, 40, dtype=torch.uint8)
    mask[0, 10:30, 10:25] = 1
    boxes = torch.tensor([[10.0, 10.0, 25.0, 30.0], [10.0, 10.0, 40.0, 30.0], [0.0, 20.5, 40.0, 40.0]])
    targets = mask_targets(mask, boxes, torch.zeros(3, dtype=torch.int64), 28)
    assert set(targets.unique().tolist()) == {0, 1}
    assert targets[0].all()
    assert torch.equal(targets[1], (torch.arange(28) < 14).float().expand(28, 28))
