"""Drawing and writing down what a detector finds in images."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from faster_coco_eval.core import mask as run_lengths
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

from ..images import read_image
from ..pictures import colour, picture_names
from .evaluation import Detection


def write_pictures(
    folder: Path, files: Sequence[Path], outputs: Sequence[list[Detection]], classes: Sequence[str], threshold: float
) -> list[str]:
    """Draws boxes, masks, labels and scores into every image.

    Returns:
        The pictures' names in the folder: STEM.png.
    """
    names = picture_names(files)
    for name, file, found in zip(names, files, outputs, strict=True):
        shown = [one for one in found if one["score"] >= threshold]
        drawn(pil_to_tensor(read_image(file)), shown, classes).save(folder / name)
    return names


def drawn(image: Tensor, found: Sequence[Detection], classes: Sequence[str]) -> Image.Image:
    """An image [3, H, W] uint8 with what was found in it, a colour a class."""
    if found:
        colours = [colour(one["label"]) for one in found]
        masks = [run_lengths.decode(one["segmentation"]) for one in found if "segmentation" in one]
        if masks:
            shapes = torch.stack([torch.from_numpy(mask).bool() for mask in masks])
            image = draw_segmentation_masks(image, shapes, alpha=0.5, colors=colours)
        boxes = torch.tensor([one["bbox"] for one in found])
        boxes[:, 2:] += boxes[:, :2]
        labels = [f"{classes[one['label'] - 1]} {one['score']:.2f}" for one in found]
        image = draw_bounding_boxes(image, boxes, labels, colours, width=2, label_colors="white", fill_labels=True)
    return to_pil_image(image)


def write_coco(
    file: Path,
    images: Sequence[Path],
    pictures: Sequence[str],
    outputs: Sequence[list[Detection]],
    classes: Sequence[str],
) -> None:
    """Writes images, categories and annotations (with scores) in COCO's format; ids count from 1."""
    content: dict[str, list[dict[str, object]]] = {
        "images": [],
        "categories": [{"id": label, "name": name} for label, name in enumerate(classes, start=1)],
        "annotations": [],
    }
    for number, (path, picture, found) in enumerate(zip(images, pictures, outputs, strict=True), start=1):
        size = read_image(path).size
        entry = {"id": number, "file_name": str(path), "width": size[0], "height": size[1], "picture": picture}
        content["images"].append(entry)
        for one in found:
            runs = one.get("segmentation")
            area = float(run_lengths.area(runs)) if runs else one["bbox"][2] * one["bbox"][3]
            content["annotations"].append(
                {
                    "id": len(content["annotations"]) + 1,
                    "image_id": number,
                    "category_id": one["label"],
                    "bbox": one["bbox"],
                    "area": area,
                    "iscrowd": 0,
                    "score": one["score"],
                    **({"segmentation": runs} if runs else {}),
                }
            )
    file.write_text(json.dumps(content))
