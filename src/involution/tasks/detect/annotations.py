"""COCO's annotation files, checked entry by entry: the first one that cannot be right is named."""

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

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
    """What a file holds: images, names of categories by id, objects by image (images without any are in it, too)."""

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


class AnnotationError(ValueError):
    """An annotation file, or an entry of it, is not as COCO's are; the message names the entry."""


def read_annotations(file: Path, image_folder: Path, masks: bool = False, on_error: str = "raise") -> Annotations:
    """Reads and checks an annotation file.

    Args:
        file: COCO's instances JSON: images, categories and annotations.
        image_folder: where the images are; each must be there.
        masks: every object must have a segmentation.
        on_error: "raise", or "skip" to leave out objects that are not right, with a warning that names the first;
            images and categories must be right in any case.

    Raises:
        AnnotationError: an entry is not right; the first one is named.
        FileNotFoundError: the file itself is missing.
    """
    try:
        content = json.loads(file.read_text())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise AnnotationError(f"{file} is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise AnnotationError(f"{file} must hold an object with images, categories and annotations")
    for part in ("images", "categories", "annotations"):
        if not isinstance(content.get(part), list):
            raise AnnotationError(f"{file}: {part} must be a list, got {_shown(content.get(part))}")
    objects_found = [one for one in content["annotations"] if isinstance(one, dict)]
    if masks and objects_found and not any(one.get("segmentation") for one in objects_found):
        raise AnnotationError(
            f"{file}: an object must have a segmentation, for masks are asked for, got {len(objects_found)} boxes "
            "alone; faster_rcnn_rednet50_fpn_1x is a recipe for boxes"
        )
    categories: dict[int, str] = {}
    for entry in _entries(file, content, "categories"):
        name = entry.value("name", str, "a name")
        entry.check(name.strip() != "" and name not in categories.values(), "name", "a new name", name)
        categories[entry.new_id(categories)] = name
    images: dict[int, ImageEntry] = {}
    names: set[str] = set()
    for entry in _entries(file, content, "images"):
        image = _image(entry, image_folder, names)
        images[entry.new_id(images)] = image
    objects: dict[int, list[ObjectEntry]] = {image: [] for image in images}
    seen: set[int] = set()
    problems: list[AnnotationError] = []
    for entry in _entries(file, content, "annotations"):
        try:
            seen.add(entry.new_id(seen))
            where = entry.value("image_id", int, "an image's id")
            entry.check(where in images, "image_id", "the id of an image of this file", where)
            objects[where].append(_object(entry, images[where], categories, masks))
        except AnnotationError as error:
            if on_error == "raise":
                raise
            problems.append(error)
    if problems:
        warnings.warn(f"left out {len(problems)} objects, the first: {problems[0]}", RuntimeWarning, stacklevel=1)
    return Annotations(list(images.values()), categories, objects)


class _Entry:
    """One entry of a list, which names itself in errors."""

    def __init__(self, name: str, fields: dict[str, Any]) -> None:
        self.name, self.fields = name, fields

    def check(self, right: bool, field: str, wanted: str, got: Any) -> None:
        if not right:
            raise AnnotationError(f"{self.name}: {field} must be {wanted}, got {_shown(got)}")

    def value(self, field: str, kind: type, wanted: str) -> Any:
        found = self.fields.get(field)
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
    entry.check(name not in names, "file_name", "a file that no other image has", name)
    names.add(name)
    inside = name.strip() != "" and not Path(name).is_absolute() and ".." not in Path(name).parts
    entry.check(inside, "file_name", "a path below the image folder", name)
    entry.check((folder / name).is_file(), "file_name", f"a file in {folder}", name)
    sizes = [entry.value(side, int, "a whole number of pixels") for side in ("width", "height")]
    for side, size in zip(("width", "height"), sizes, strict=True):
        entry.check(size >= 1, side, "at least 1", size)
    return ImageEntry(entry.fields["id"], name, *sizes)


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
    elif isinstance(segmentation, dict):
        _check_run_lengths(entry, segmentation, image)
    else:
        _check_polygons(entry, segmentation)
    return ObjectEntry(entry.fields["id"], category, (left, top, width, height), bool(crowd), segmentation, area)


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
