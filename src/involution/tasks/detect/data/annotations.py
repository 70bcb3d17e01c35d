"""COCO's annotation files, checked entry by entry: the first one that cannot be right is named."""

import json
import math
import random
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ....engine.files import read_text

OUTSIDE = 1.0  # pixels that a box may reach over its image's edge: people round


class ImageEntry(NamedTuple):
    """An image: its file (below the image folder) and its size in pixels."""

    id: int
    file: str
    width: int
    height: int


class ObjectEntry(NamedTuple):
    """An object: its box as (left, top, width, height) in pixels, and COCO's polygons or run lengths, or None.

    Its area in square pixels is what the file says, or else the box's.
    """

    id: int
    category: int
    box: tuple[float, float, float, float]
    crowd: bool
    segmentation: Any
    area: float

    @property
    def corners(self) -> tuple[float, float, float, float]:
        """The box as (left, top, right, bottom)."""
        left, top, width, height = self.box
        return left, top, left + width, top + height


class Annotations(NamedTuple):
    """What a file holds: images, names of categories by id, objects by image (images without any are in it, too).

    Categories are in the order of their ids, whatever the file's is: labels, which count them, are then the same in
    every part of the data.
    """

    images: list[ImageEntry]
    categories: dict[int, str]
    objects: Mapping[int, list[ObjectEntry]]

    def only(self, names: Sequence[str]) -> "Annotations":
        """The same images with the objects of some categories.

        Raises:
            ValueError: there is no such category.
        """
        ids = {name: category for category, name in self.categories.items()}
        missing = [name for name in names if name not in ids]
        if missing or not names:
            raise ValueError(f"categories must be some of {', '.join(ids)}, got {missing or 'none'}")
        kept = {ids[name]: name for name in names}
        objects = {image: [one for one in found if one.category in kept] for image, found in self.objects.items()}
        return Annotations(self.images, kept, objects)

    def part(self, fraction: float, held_out: bool) -> "Annotations":
        """A fraction of the images, held out by chance but always the same ones, and at least one; or the others."""
        chosen = set(random.Random(0).sample(range(len(self.images)), max(1, round(fraction * len(self.images)))))
        images = [one for index, one in enumerate(self.images) if (index in chosen) == held_out]
        return Annotations(images, self.categories, {one.id: self.objects[one.id] for one in images})


class AnnotationError(ValueError):
    """An annotation file, or an entry of it, is not as COCO's are; the message names the entry."""


def read_annotations(
    file: Path, image_folder: Path, masks: bool = False, on_error: str = "raise", evaluation: bool = False
) -> Annotations:
    """Reads and checks an annotation file.

    A category that no object has is left out where another one has its name; one that has the name of its supercategory
    is one with it, as in Roboflow's exports.

    Args:
        file: COCO's instances JSON: images, categories and annotations.
        image_folder: where the images are; each must be there.
        masks: every object must have a segmentation.
        on_error: "raise", or "skip" to go on with the objects that are right: boxes that reach over the edge are
            clipped, other objects that are not right are left out, and warnings name the first of each. Images and
            categories must be right in any case.
        evaluation: the objects are the truth that detections are compared with. It is never changed: with "skip",
            objects that are not right stay as the file has them, and count as in COCO's own evaluation.

    Raises:
        AnnotationError: an entry is not right; the first one is named. With "skip" and `evaluation`, an object cannot
            be counted: its box is not of four finite numbers, or its mask cannot be read where masks are asked for.
        FileNotFoundError: the file itself is missing.
    """
    try:
        content = json.loads(read_text(file))
    except ValueError as error:
        raise AnnotationError(f"{file} is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise AnnotationError(f"{file} must hold an object with images, categories and annotations")
    for part in ("images", "categories", "annotations"):
        if not isinstance(content.get(part), list):
            raise AnnotationError(
                f"{file}: {part} must be a list, got {_shown(content.get(part))}; the file must be in COCO's format "
                "for objects, as data.annotations names it"
            )
    objects_found = [one for one in content["annotations"] if isinstance(one, dict)]
    if masks and objects_found and not any(one.get("segmentation") for one in objects_found):
        raise AnnotationError(
            f"{file}: an object must have a segmentation, for masks are asked for, got {len(objects_found)} boxes "
            "alone; faster_rcnn_rednet50_fpn_1x is a recipe for boxes"
        )
    categories, same = _categories(file, content)
    images: dict[int, ImageEntry] = {}
    names: set[str] = set()
    for entry in _entries(file, content, "images"):
        image = _image(entry, image_folder, names)
        images[entry.new_id(images)] = image
    objects: dict[int, list[ObjectEntry]] = {image: [] for image in images}
    seen: set[int] = set()
    problems: list[AnnotationError] = []
    clipped: list[str] = []
    for entry in _entries(file, content, "annotations"):
        category = entry.number("category_id")
        if category in same:
            entry.fields["category_id"] = same[category]
        number = entry.number("image_id")
        of = None if number is None else images.get(number)
        if on_error == "skip" and not evaluation and of is not None:
            clipped += _clip(entry, of)
        try:
            seen.add(entry.new_id(seen))
            where = entry.value("image_id", int, "an image's id")
            entry.check(where in images, "image_id", "the id of an image of this file", where)
            objects[where].append(_object(entry, images[where], categories, masks))
        except AnnotationError as error:
            if on_error == "raise":
                raise
            problems.append(error)
            if evaluation and of is not None and entry.number("category_id") in categories:
                objects[of.id].append(_as_it_is(entry, of, masks))
    if clipped:
        warnings.warn(f"clipped {len(clipped)} boxes, the first: {clipped[0]}", RuntimeWarning, stacklevel=1)
    if problems:
        done = "evaluated as they are" if evaluation else "left out"
        warnings.warn(f"{done} {len(problems)} objects, the first: {problems[0]}", RuntimeWarning, stacklevel=1)
    return Annotations(list(images.values()), categories, objects)


def _categories(file: Path, content: dict[str, Any]) -> tuple[dict[int, str], dict[int, int]]:
    """Names by id, in the order of ids, and the ids that mean another one's category.

    In Roboflow's exports the project is a category, too, and every category's supercategory. Where a class has its
    name, the two are one.
    """
    found = [(entry, entry.value("name", str, "a name")) for entry in _entries(file, content, "categories")]
    used = {_Entry("", one).number("category_id") for one in content["annotations"] if isinstance(one, dict)}
    projects = {name for entry, name in found if entry.fields.get("supercategory") == name}
    kept = {name: entry.number("id") for entry, name in found}  # of several, the last one with objects, or the last
    kept |= {name: entry.number("id") for entry, name in found if entry.number("id") in used}
    ids: set[int] = set()
    categories: dict[int, str] = {}
    same: dict[int, int] = {}
    for entry, name in found:
        number = entry.new_id(ids)
        ids.add(number)
        main = kept[name]
        if number != main and main is not None and (number not in used or name in projects):
            same[number] = main
            continue
        entry.check(name.strip() != "" and name not in categories.values(), "name", "a new name", name)
        categories[number] = name
    return dict(sorted(categories.items())), same


class _Entry:
    """One entry of a list, which names itself in errors."""

    def __init__(self, name: str, fields: dict[str, Any]) -> None:
        self.name, self.fields = name, fields

    def check(self, right: bool, field: str, wanted: str, got: Any) -> None:
        if not right:
            raise AnnotationError(f"{self.name}: {field} must be {wanted}, got {_shown(got)}")

    def number(self, field: str) -> int | None:
        """A whole number, or None; some tools write 64.0."""
        found = self.fields.get(field)
        if isinstance(found, float) and found.is_integer():
            found = self.fields[field] = int(found)
        return found if isinstance(found, int) and not isinstance(found, bool) else None

    def value(self, field: str, kind: type, wanted: str) -> Any:
        found = self.number(field) if kind is int else None
        found = self.fields.get(field) if found is None else found
        self.check(isinstance(found, kind) and not isinstance(found, bool), field, wanted, found)
        return found

    def new_id(self, known: Any) -> int:
        found: int = self.value("id", int, "an integer")
        self.check(found not in known, "id", "one that no other entry has", found)
        return found


def _entries(file: Path, content: dict[str, Any], part: str) -> "list[_Entry]":
    entries = []
    for index, fields in enumerate(content[part]):
        name = f"{file}: {part}[{index}]"
        if not isinstance(fields, dict):
            raise AnnotationError(f"{name} must be an object, got {_shown(fields)}")
        entries.append(_Entry(f"{name} (id {_shown(fields.get('id'))})", fields))
    return entries


def _image(entry: _Entry, folder: Path, names: set[str]) -> ImageEntry:
    name = entry.value("file_name", str, "a file's name")
    if "\\" in name and not (folder / name).is_file():  # exported on Windows
        name = name.replace("\\", "/")
    entry.check(name not in names, "file_name", "a file that no other image has", name)
    names.add(name)
    inside = name.strip() != "" and not Path(name).is_absolute() and ".." not in Path(name).parts
    entry.check(inside, "file_name", "a path below the image folder", name)
    entry.check((folder / name).is_file(), "file_name", f"a file in {folder}", name)
    sizes = [entry.value(side, int, "a whole number of pixels") for side in ("width", "height")]
    for side, size in zip(("width", "height"), sizes, strict=True):
        entry.check(size >= 1, side, "at least 1", size)
    return ImageEntry(entry.new_id(()), name, *sizes)


def _object(entry: _Entry, image: ImageEntry, categories: dict[int, str], masks: bool) -> ObjectEntry:
    category = entry.value("category_id", int, "a category's id")
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
    if segmentation is None:
        entry.check(not masks, "segmentation", "there, for masks are asked for", entry.fields.get("segmentation"))
    else:
        _check_segmentation(entry, segmentation, image)
    return ObjectEntry(entry.fields["id"], category, (left, top, width, height), bool(crowd), segmentation, area)


def _clip(entry: _Entry, image: ImageEntry) -> list[str]:
    """Clips a box that reaches over its image's edge; says which. A box that is no box, or wholly outside, stays."""
    box: Any = entry.fields.get("bbox")
    if not _are_numbers(box, 4):
        return []
    left, top, right, bottom = box[0], box[1], box[0] + box[2], box[1] + box[3]
    outside = max(-left, -top, right - image.width, bottom - image.height)
    left, top = max(0, left), max(0, top)
    right, bottom = min(image.width, right), min(image.height, bottom)
    if outside <= OUTSIDE or right <= left or bottom <= top:
        return []
    entry.fields["bbox"] = [left, top, right - left, bottom - top]
    return [f"{entry.name}: bbox must be inside its image of {image.width}x{image.height}, got {_shown(box)}"]


def _as_it_is(entry: _Entry, image: ImageEntry, masks: bool) -> ObjectEntry:
    """An object of the truth as the file has it, which may be wrong, but not so that it cannot be counted."""
    fields = entry.fields
    box: Any = fields.get("bbox")
    entry.check(_are_numbers(box, 4), "bbox", "four finite numbers, for evaluation leaves no object out", box)
    area = fields.get("area", box[2] * box[3])
    entry.check(_are_numbers([area], 1), "area", "a number", area)
    segmentation = fields.get("segmentation") or None
    if masks and segmentation is not None:
        _check_segmentation(entry, segmentation, image)
    crowd = bool(fields.get("iscrowd", 0))
    return ObjectEntry(
        entry.number("id") or 0, fields["category_id"], tuple(box), crowd, segmentation if masks else None, area
    )


def _check_segmentation(entry: _Entry, segmentation: Any, image: ImageEntry) -> None:
    if isinstance(segmentation, dict):
        _check_run_lengths(entry, segmentation, image)
    else:
        _check_polygons(entry, segmentation)


def _check_polygons(entry: _Entry, polygons: Any) -> None:
    entry.check(isinstance(polygons, list), "segmentation", "polygons or run lengths", polygons)
    for index, polygon in enumerate(polygons):
        enough = isinstance(polygon, list) and len(polygon) >= 6 and len(polygon) % 2 == 0
        wanted = "at least three points, x and y in turn"
        entry.check(enough and _are_numbers(polygon, len(polygon)), f"segmentation[{index}]", wanted, polygon)


def _check_run_lengths(entry: _Entry, runs: dict[str, Any], image: ImageEntry) -> None:
    size, counts = runs.get("size"), runs.get("counts")
    entry.check(size == [image.height, image.width], "segmentation.size", f"[{image.height}, {image.width}]", size)
    if isinstance(counts, str):  # compressed; pycocotools' own notation
        entry.check(counts != "" and counts.isascii(), "segmentation.counts", "run lengths", counts)
        return
    whole = isinstance(counts, list) and all(isinstance(count, int) and count >= 0 for count in counts)
    entry.check(whole, "segmentation.counts", "run lengths", counts)
    pixels = image.width * image.height
    entry.check(sum(counts or []) == pixels, "segmentation.counts", f"of {pixels} pixels in all", sum(counts or []))


def _are_numbers(values: Any, count: int) -> bool:
    return (
        isinstance(values, list)
        and len(values) == count
        and all(isinstance(one, int | float) and not isinstance(one, bool) and math.isfinite(one) for one in values)
    )


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
