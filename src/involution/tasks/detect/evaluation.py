"""COCO's average precision, by faster-coco-eval, and detections in COCO's format."""

from collections.abc import Iterable
from typing import Any

import numpy as np
from faster_coco_eval import COCO, COCOeval_faster
from faster_coco_eval.core import mask as run_lengths
from torch import Tensor

from .data.annotations import Annotations

KINDS = {"box": "bbox", "mask": "segm"}  # ours and COCO's names
NUMBERS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
Detection = dict[str, Any]


def detections(found: dict[str, Tensor]) -> list[Detection]:
    """What a detector found in an image, with plain values.

    Args:
        found: boxes [n, 4], labels [n] from 1 on, scores [n] and, if there are any, masks [n, 1, H, W] in 0..1.

    Returns:
        A dictionary each: label, score, bbox (left, top, width, height), and segmentation (compressed run lengths).
    """
    boxes = found["boxes"].float().cpu().clone()  # which the caller keeps
    boxes[:, 2:] -= boxes[:, :2]
    columns = zip(found["labels"].tolist(), found["scores"].float().tolist(), boxes.tolist(), strict=True)
    result: list[Detection] = [{"label": label, "score": score, "bbox": box} for label, score, box in columns]
    if "masks" in found:
        for one, mask in zip(result, found["masks"][:, 0], strict=True):
            runs = run_lengths.encode(np.asfortranarray((mask > 0.5).byte().cpu().numpy()))
            one["segmentation"] = {"size": list(runs["size"]), "counts": _text(runs["counts"])}
    return result


def _text(counts: bytes | str) -> str:
    return counts.decode("ascii") if isinstance(counts, bytes) else counts


def as_results(image_id: int, found: Iterable[Detection], categories: list[int], kind: str) -> list[dict[str, Any]]:
    """Detections of an image as COCO's results of a kind, box or mask.

    Args:
        image_id: of the image.
        found: see `detections`.
        categories: their ids, in the order of labels.
        kind: "box" or "mask".
    """
    field = {"box": "bbox", "mask": "segmentation"}[kind]
    return [
        {
            "image_id": image_id,
            "category_id": categories[one["label"] - 1],
            field: one[field],
            "score": one["score"],
        }
        for one in found
    ]


def ground_truth(annotations: Annotations) -> dict[str, Any]:
    """Annotations in COCO's format.

    Objects are numbered anew, from 1 on: COCO's evaluation takes the id 0, with which some tools begin, for none.
    """
    objects = [(image, one) for image, found in annotations.objects.items() for one in found]
    return {
        "images": [{"id": one.id, "width": one.width, "height": one.height} for one in annotations.images],
        "categories": [{"id": category, "name": name} for category, name in annotations.categories.items()],
        "annotations": [
            {
                "id": number,
                "image_id": image,
                "category_id": one.category,
                "bbox": list(one.box),
                "area": one.area,
                "iscrowd": int(one.crowd),
                **({} if one.segmentation is None else {"segmentation": one.segmentation}),
            }
            for number, (image, one) in enumerate(objects, start=1)
        ],
    }


def _with_mask(one: dict[str, Any]) -> dict[str, Any]:
    if one.get("segmentation"):
        return one
    left, top, width, height = one["bbox"]
    corners = [left, top, left + width, top, left + width, top + height, left, top + height]
    return one | {"segmentation": [corners], "iscrowd": 1}


def average_precision(
    truth: dict[str, Any], results: list[dict[str, Any]], kind: str, images: Iterable[int]
) -> tuple[dict[str, float], list[str]]:
    """COCO's twelve numbers.

    An object without a segmentation is ignored in the numbers of masks, as a crowd is: what is found in its box is
    neither right nor wrong.

    Args:
        truth: annotations in COCO's format.
        results: detections, likewise.
        kind: "box" or "mask".
        images: ids of those that were looked at.

    Returns:
        The numbers by name: AP (IoU 0.50:0.95), AP50, AP75, those of small, medium and large objects, average recalls
        with 1, 10 and 100 detections an image, and of sizes; -1 where there is no object. And the lines that COCO's
        own tool prints.
    """
    lines: list[str] = []
    if kind == "mask":
        truth = truth | {"annotations": [_with_mask(one) for one in truth["annotations"]]}
    expected = COCO(truth, use_deepcopy=True)
    found = expected.loadRes([dict(one) for one in results])
    evaluation = COCOeval_faster(expected, found, iouType=KINDS[kind], print_function=lines.append)
    evaluation.params.imgIds = sorted(images)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    # faster-coco-eval adds recalls at fixed overlaps, which COCO's tool does not print.
    summary = [line for line in lines if line.startswith(" Average")][: len(NUMBERS)]
    return dict(zip(NUMBERS, map(float, evaluation.stats), strict=False)), summary
