"""A small folder in COCO's format."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

SIZES = [(64, 48), (48, 64), (64, 48), (48, 64), (60, 60), (64, 48), (50, 40)]  # width, height


def write_coco(root: Path, repeats: int = 1) -> Path:
    """Images with one or two bright rectangles on noise; the last but one also has a crowd, the last has no object.

    The training part has each of them `repeats` times.
    """
    random = np.random.default_rng(0)
    (root / "annotations").mkdir(parents=True)
    for part, shift, sizes in (("train2017", 0, SIZES * repeats), ("val2017", 2, SIZES)):
        (root / part).mkdir()
        content: dict[str, Any] = {
            "categories": [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}],
            "images": [],
            "annotations": [],
        }
        for index, (width, height) in enumerate(sizes):
            pixels = random.integers(0, 60, (height, width, 3), dtype=np.uint8)
            image_id = 100 + index
            content["images"].append({"id": image_id, "file_name": f"{index}.png", "width": width, "height": height})
            kind = index % len(SIZES)
            for number in range(0 if kind == len(SIZES) - 1 else 1 + kind % 2):
                left, top, side = 2 + 22 * number, 4 + shift, 18 + 2 * number
                pixels[top : top + side, left : left + side] = 250 if number else (250, 40, 40)
                corners = [left, top, left + side, top, left + side, top + side, left, top + side]
                add(content, image_id, 7 if number else 3, [left, top, side, side], segmentation=[corners])
            if kind == len(SIZES) - 2:
                runs = [0, height * width // 2, height * width - height * width // 2]
                crowd = {"size": [height, width], "counts": runs}
                add(content, image_id, 3, [0, 0, width // 2, height], segmentation=crowd, iscrowd=1)
            Image.fromarray(pixels).save(root / part / f"{index}.png")
        (root / "annotations" / f"instances_{part}.json").write_text(json.dumps(content))
    return root


def add(content: dict[str, Any], image_id: int, category: int, box: list[int], **more: Any) -> None:
    """Appends an annotation."""
    entry = {"image_id": image_id, "category_id": category, "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
    content["annotations"].append({"id": len(content["annotations"]) + 1, **entry, **more})


@pytest.fixture(scope="session")
def make_coco() -> Callable[..., Path]:
    """See `write_coco`."""
    return write_coco


@pytest.fixture(scope="session")
def coco_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_coco(tmp_path_factory.mktemp("coco") / "small")
