"""Drawing and writing down what a detector finds in images."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from faster_coco_eval.core import mask as run_lengths
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

from ...engine.pictures import colour, picture_names
from ...engine.writer import PredictionWriter
from .evaluation import Detection


class DetectionWriter(PredictionWriter):
    """Draws what is found in images, and writes it down in COCO's format.

    Args:
        folder: where the results go.
        files: the images.
        classes: their names.
        score_threshold: what scores less is in predictions.json, but not in the pictures.

    Raises:
        ValueError: score_threshold is not in 0..1.
    """

    def __init__(self, folder: Path, files: Sequence[Path], classes: Sequence[str], score_threshold: float) -> None:
        if not 0 <= score_threshold <= 1:
            raise ValueError(f"score_threshold must be in 0..1, got {score_threshold!r}")
        super().__init__(folder, files)
        self.names = picture_names(files)
        self.classes, self.score_threshold = classes, score_threshold
        self._found: dict[int, tuple[tuple[int, int], list[Detection]]] = {}  # sizes, and what was found

    def add(self, index: int, output: list[Detection], pixels: Tensor | None) -> None:
        """Draws boxes, masks, labels and scores into files[index]: STEM.png."""
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
    """A detection as COCO's annotation of that id, in the image of that id."""
    runs = found.get("segmentation")
    return {
        "id": number,
        "image_id": image,
        "category_id": found["label"],
        "bbox": found["bbox"],
        "area": float(run_lengths.area(runs)) if runs else found["bbox"][2] * found["bbox"][3],
        "iscrowd": 0,
        "score": found["score"],
        **({"segmentation": runs} if runs else {}),
    }


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
