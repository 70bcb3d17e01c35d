"""Writing detections of image files: a picture of each, and predictions.json in COCO's format."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

from ...engine.pictures import colour, picture_names
from ...engine.writer import PredictionWriter
from .annotations.run_lengths import area, decode
from .evaluation import Detection


class DetectionWriter(PredictionWriter):
    """Draws detections into images, and writes them in COCO's format.

    Args:
        folder: of the results.
        files: the images.
        classes: names of the classes, in the order of labels.
        score_threshold: minimum score of a detection in the pictures; predictions.json has all detections.

    Raises:
        ValueError: score_threshold is not in 0..1.
    """

    def __init__(self, folder: Path, files: Sequence[Path], classes: Sequence[str], score_threshold: float) -> None:
        if not 0 <= score_threshold <= 1:
            raise ValueError(f"score_threshold must be in 0..1, got {score_threshold!r}")
        super().__init__(folder, files)
        self.names = picture_names(files)
        self.classes, self.score_threshold = classes, score_threshold
        self._found: dict[int, tuple[tuple[int, int], list[Detection]]] = {}  # width, height; detections

    def add(self, index: int, output: list[Detection], pixels: Tensor | None) -> None:
        """Writes STEM.png: files[index] with boxes, masks, labels and scores."""
        assert pixels is not None  # `pictures` is all files
        shown = [one for one in output if one["score"] >= self.score_threshold]
        drawn(pixels, shown, self.classes).save(self.folder / self.names[index])
        self._found[index] = (pixels.shape[2], pixels.shape[1]), output

    def close(self) -> None:
        """Writes predictions.json: images, categories and annotations with scores; ids count from 1."""
        content: dict[str, list[dict[str, object]]] = {
            "images": [],
            "categories": [{"id": label, "name": name} for label, name in enumerate(self.classes, start=1)],
            "annotations": [],
        }
        for number, index in enumerate(sorted(self._found), start=1):
            (width, height), found = self._found[index]
            entry = {"id": number, "file_name": str(self.files[index]), "width": width, "height": height}
            content["images"].append(entry | {"picture": self.names[index]})
            for one in found:
                content["annotations"].append(annotation(one, len(content["annotations"]) + 1, number))
        file = self.folder / "predictions.json"
        file.write_text(json.dumps(content))
        print(f"wrote {file} and {len(self._found)} pictures beside it")


def annotation(found: Detection, number: int, image: int) -> dict[str, object]:
    """A detection as COCO's annotation.

    Args:
        found: see `evaluation.detections`.
        number: id of the annotation.
        image: id of its image.
    """
    runs = found.get("segmentation")
    return {
        "id": number,
        "image_id": image,
        "category_id": found["label"],
        "bbox": found["bbox"],
        "area": area(runs) if runs else found["bbox"][2] * found["bbox"][3],
        "iscrowd": 0,
        "score": found["score"],
        **({"segmentation": runs} if runs else {}),
    }


def drawn(image: Tensor, found: Sequence[Detection], classes: Sequence[str]) -> Image.Image:
    """An image [3, H, W] uint8 with detections drawn into it, one colour per class."""
    if found:
        colours = [colour(one["label"]) for one in found]
        masks = [decode(one["segmentation"]) for one in found if "segmentation" in one]
        if masks:
            shapes = torch.stack([torch.from_numpy(mask).bool() for mask in masks])
            image = draw_segmentation_masks(image, shapes, alpha=0.5, colors=colours)
        boxes = torch.tensor([one["bbox"] for one in found])
        boxes[:, 2:] += boxes[:, :2]
        labels = [f"{classes[one['label'] - 1]} {one['score']:.2f}" for one in found]
        image = draw_bounding_boxes(image, boxes, labels, colours, width=2, label_colors="white", fill_labels=True)
    return to_pil_image(image)
