"""COCO's average precision, by faster-coco-eval, and detections in COCO's format."""

from collections.abc import Iterable
from typing import Any

from faster_coco_eval import COCO, COCOeval_faster
from torch import Tensor

from .annotations import Annotations
from .annotations.run_lengths import encode

KINDS = {"box": "bbox", "mask": "segm"}  # our names and COCO's
NUMBERS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
Detection = dict[str, Any]


def detections(found: dict[str, Tensor]) -> list[Detection]:
    """The detections of an image as plain values.

    Args:
        found: boxes [n, 4], labels [n] from 1 on, scores [n] and, from a mask head, masks [n, 1, H, W] in 0..1.

    Returns:
        One dictionary each: label, score, bbox (left, top, width, height), and segmentation (compressed run lengths).
    """
    boxes = found["boxes"].float().cpu().clone()  # the caller's boxes stay unchanged
    boxes[:, 2:] -= boxes[:, :2]
    columns = zip(found["labels"].tolist(), found["scores"].float().tolist(), boxes.tolist(), strict=True)
    result: list[Detection] = [{"label": label, "score": score, "bbox": box} for label, score, box in columns]
    if "masks" in found:
        for one, mask in zip(result, found["masks"][:, 0], strict=True):
            one["segmentation"] = encode(mask > 0.5)
    return result


def as_results(image_id: int, found: Iterable[Detection], categories: list[int], kind: str) -> list[dict[str, Any]]:
    """Detections of an image in COCO's results format.

    Args:
        image_id: of the image.
        found: see `detections`.
        categories: category ids, in the order of labels.
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

    Objects get new ids from 1 on: COCO's evaluation treats an object of the id 0, from which some tools count, as
    unmatched.
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

    For masks, an object without a segmentation is ignored as a crowd is: a detection in its box counts neither as a
    true nor as a false positive.

    Args:
        truth: annotations in COCO's format.
        results: detections in COCO's results format.
        kind: "box" or "mask".
        images: ids of the evaluated images.

    Returns:
        The numbers by name: AP (IoU 0.50:0.95), AP50, AP75, AP of small, medium and large objects, average recall with
        1, 10 and 100 detections per image, and of small, medium and large objects; -1 where there is no object. And
        the twelve lines that COCO's own tool prints.
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
    # faster-coco-eval adds average recalls at IoU 0.50 and 0.75, which COCO's tool does not print.
    summary = [line for line in lines if line.startswith(" Average")][: len(NUMBERS)]
    return dict(zip(NUMBERS, map(float, evaluation.stats), strict=False)), summary
