"""Tiny trees of every data format."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

Ids = np.ndarray
SIZES = ((40, 56), (48, 64), (40, 48), (56, 48))  # height and width of scenes, cyclically


def scene(number: int, classes: int = 3) -> tuple[Image.Image, Ids]:
    """An image of bright rectangles, one colour per class, on dark background, and its class indices."""
    random = np.random.default_rng(number)
    height, width = SIZES[number % len(SIZES)]
    ids = np.zeros((height, width), np.uint8)
    for index in range(1, classes):
        top, left = random.integers(0, height - 16), random.integers(0, width - 16)
        ids[top : top + 16, left : left + 16] = index
    colours = np.array([(30, 30, 30), (220, 40, 40), (40, 220, 40), (40, 40, 220), (200, 200, 40)], np.uint8)
    noise = random.integers(0, 20, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(colours[ids] + noise), ids


def save(number: int, image: Path, mask: Path, change: Callable[[Ids], Ids] = lambda ids: ids) -> None:
    for file in (image, mask):
        file.parent.mkdir(parents=True, exist_ok=True)
    photograph, ids = scene(number)
    photograph.save(image)
    Image.fromarray(change(ids)).save(mask)


def folders(root: Path, train: int = 4) -> Path:
    for part, count in (("train", train), ("val", 3)):
        for number in range(count):
            save(number, root / "images" / part / f"{number}.png", root / "masks" / part / f"{number}.png", ignoring)
    return root


def ignoring(ids: Ids) -> Ids:
    """Marks the upper left corner as ignored."""
    ids = ids.copy()
    ids[:4, :4] = 255
    return ids


def camvid(root: Path) -> Path:
    for part in ("train", "val", "test"):
        for number in range(2):
            where = root / part
            save(number, where / "images" / f"{number}.jpg", where / "labels" / f"{number}.png", lambda ids: 4 * ids)
    return root


def cityscapes(root: Path) -> Path:
    raw = np.array([7, 26, 3], np.uint8)  # road, car, and something that is not evaluated
    for part in ("train", "val"):
        for number in range(2):
            name = f"aachen_{number:06}_000019"
            image = root / "leftImg8bit" / part / "aachen" / f"{name}_leftImg8bit.png"
            mask = root / "gtFine" / part / "aachen" / f"{name}_gtFine_labelIds.png"
            save(number, image, mask, lambda ids: raw[ids])
    return root


def voc(root: Path) -> Path:
    base = root / "VOCdevkit" / "VOC2012"
    (base / "ImageSets" / "Segmentation").mkdir(parents=True)
    for part, numbers in (("train", (0, 1)), ("val", (2, 3))):
        (base / "ImageSets" / "Segmentation" / f"{part}.txt").write_text("".join(f"2007_{n:06}\n" for n in numbers))
        for number in numbers:
            mask = base / "SegmentationClass" / f"2007_{number:06}.png"
            save(number, base / "JPEGImages" / f"2007_{number:06}.jpg", mask, ignoring)
            coloured = Image.open(mask)
            coloured.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0] + 247 * [224, 224, 192])
            coloured.save(mask)
            assert Image.open(mask).mode == "P"
    return root


def pets(root: Path) -> Path:
    base = root / "oxford-iiit-pet"
    (base / "annotations").mkdir(parents=True)
    for part, numbers in (("trainval", (0, 1, 2, 3)), ("test", (4, 5))):
        lines = [f"Beagle_{number} 1 2 1\n" for number in numbers]
        (base / "annotations" / f"{part}.txt").write_text("".join(lines))
        for number in numbers:
            mask = base / "annotations" / "trimaps" / f"Beagle_{number}.png"
            save(number, base / "images" / f"Beagle_{number}.jpg", mask, lambda ids: ids + 1)
    return root


TREES = {"masks": folders, "camvid": camvid, "cityscapes": cityscapes, "voc": voc, "pets": pets}


@pytest.fixture
def tree(tmp_path: Path) -> Callable[[str], Path]:
    """Writes a tree of a format and returns its root."""
    return lambda kind: TREES[kind](tmp_path / kind)


@pytest.fixture(scope="session")
def make_masks() -> Callable[..., Path]:
    """Writes folders of images and masks below a root, with a number of training images."""
    return folders
