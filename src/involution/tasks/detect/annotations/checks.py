"""Checks of an image, an object and a segmentation of COCO's annotation files, field by field."""

import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

from .entries import Entry, ImageEntry, ObjectEntry, shown

OUTSIDE = 1.0  # pixels that a box may reach over its image's edge: labelling tools round


def image_of(entry: Entry, folder: Path, names: Collection[str]) -> ImageEntry:
    """An image, whose file is in the folder and has none of `names`, the other images'."""
    name = entry.text("file_name", "a file's name")
    if "\\" in name and not (folder / name).is_file():  # exported on Windows
        name = name.replace("\\", "/")
    entry.check(name not in names, "file_name", "a file that no other image has", name)
    inside = name.strip() != "" and not Path(name).is_absolute() and ".." not in Path(name).parts
    entry.check(inside, "file_name", "a path below the image folder", name)
    entry.check((folder / name).is_file(), "file_name", f"a file in {folder}", name)
    sizes = [entry.integer(side, "a whole number of pixels") for side in ("width", "height")]
    for side, size in zip(("width", "height"), sizes, strict=True):
        entry.check(size >= 1, side, "at least 1", size)
    return ImageEntry(entry.new_id(()), name, *sizes)


def object_of(entry: Entry, image: ImageEntry, categories: Collection[int], masks: bool) -> ObjectEntry:
    """An object, all fields of which must be right; with `masks` it must have a segmentation."""
    category = entry.integer("category_id", "a category's id")
    entry.check(category in categories, "category_id", "the id of a category of this file", category)
    box: Any = entry.fields.get("bbox")
    entry.check(_are_numbers(box, 4), "bbox", "four finite numbers", box)
    left, top, width, height = box
    entry.check(width > 0 and height > 0, "bbox", "of positive width and height", box)
    inside = (
        min(left, top) >= -OUTSIDE and left + width <= image.width + OUTSIDE and top + height <= image.height + OUTSIDE
    )
    entry.check(inside, "bbox", f"inside its image of {image.width}x{image.height}", box)
    crowd = entry.fields.get("iscrowd", 0)
    entry.check(crowd in (0, 1), "iscrowd", "0 or 1", crowd)
    area = entry.fields.get("area", width * height)
    entry.check(_are_numbers([area], 1) and area >= 0, "area", "a number that is not negative", area)
    segmentation = entry.fields.get("segmentation") or None
    if segmentation is not None:
        check_segmentation(entry, segmentation, image)
    elif masks:
        raise entry.error("segmentation", "there, because data.masks is true", entry.fields.get("segmentation"))
    return ObjectEntry(entry.fields["id"], category, (left, top, width, height), bool(crowd), segmentation, area)


def truth_of(entry: Entry, image: ImageEntry, masks: bool) -> ObjectEntry:
    """An object of the ground truth as the file has it: it may be wrong, but not so that COCO cannot count it."""
    fields = entry.fields
    box: Any = fields.get("bbox")
    entry.check(_are_numbers(box, 4), "bbox", "four finite numbers, because evaluation skips no object", box)
    area = fields.get("area", box[2] * box[3])
    entry.check(_are_numbers([area], 1), "area", "a number", area)
    segmentation = (fields.get("segmentation") or None) if masks else None
    if segmentation is not None:
        check_segmentation(entry, segmentation, image)
    number, crowd = entry.number("id") or 0, bool(fields.get("iscrowd", 0))
    return ObjectEntry(number, fields["category_id"], tuple(box), crowd, segmentation, area)


def clip(entry: Entry, image: ImageEntry) -> str | None:
    """Clips a box that reaches over its image's edge, in place.

    Returns:
        What was clipped; None where the box is inside, wholly outside, or not four numbers.
    """
    box: Any = entry.fields.get("bbox")
    if not _are_numbers(box, 4):
        return None
    left, top, right, bottom = box[0], box[1], box[0] + box[2], box[1] + box[3]
    outside = max(-left, -top, right - image.width, bottom - image.height)
    left, top = max(0, left), max(0, top)
    right, bottom = min(image.width, right), min(image.height, bottom)
    if outside <= OUTSIDE or right <= left or bottom <= top:
        return None
    entry.fields["bbox"] = [left, top, right - left, bottom - top]
    return f"{entry.name}: bbox must be inside its image of {image.width}x{image.height}, got {shown(box)}"


def check_segmentation(entry: Entry, segmentation: Any, image: ImageEntry) -> None:
    """Refuses what is neither polygons nor run lengths of the image's size."""
    if isinstance(segmentation, dict):
        _check_run_lengths(entry, segmentation, image)
    else:
        _check_polygons(entry, segmentation)


def _check_polygons(entry: Entry, polygons: Any) -> None:
    entry.check(isinstance(polygons, list), "segmentation", "polygons or run lengths", polygons)
    for index, polygon in enumerate(polygons):
        enough = isinstance(polygon, list) and len(polygon) >= 6 and len(polygon) % 2 == 0
        if not (enough and _are_numbers(polygon, len(polygon))):
            raise entry.error(f"segmentation[{index}]", "at least three points (x, y, x, y, ...)", polygon)


def _check_run_lengths(entry: Entry, runs: dict[str, Any], image: ImageEntry) -> None:
    size, counts = runs.get("size"), runs.get("counts")
    entry.check(size == [image.height, image.width], "segmentation.size", f"[{image.height}, {image.width}]", size)
    if isinstance(counts, str):  # compressed, in pycocotools' notation
        entry.check(counts != "" and counts.isascii(), "segmentation.counts", "run lengths", counts)
        return
    whole = isinstance(counts, list) and all(isinstance(count, int) and count >= 0 for count in counts)
    entry.check(whole, "segmentation.counts", "run lengths", counts)
    pixels, total = image.width * image.height, sum(counts or [])
    entry.check(total == pixels, "segmentation.counts", f"of {pixels} pixels in all", total)


def _are_numbers(values: Any, count: int) -> bool:
    return (
        isinstance(values, list)
        and len(values) == count
        and all(isinstance(one, int | float) and not isinstance(one, bool) and math.isfinite(one) for one in values)
    )
