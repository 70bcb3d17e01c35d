"""Reading COCO's annotation files: every entry is checked, and an error names the first one that is not right."""

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from involution.engine.files import read_text

from .checks import clip, image_of, object_of, truth_of
from .entries import AnnotationError, Annotations, Entry, ImageEntry, ObjectEntry, shown


def read_annotations(
    file: Path, image_folder: Path, masks: bool = False, on_error: str = "raise", evaluation: bool = False
) -> Annotations:
    """Reads and checks an annotation file.

    A category without objects is left out where another category has its name. A category with the name of its
    supercategory is merged with it, as in Roboflow's exports.

    Args:
        file: COCO's instances JSON: images, categories and annotations.
        image_folder: the folder of the images; each must be there.
        masks: every object must have a segmentation.
        on_error: "raise", or "skip" to continue with the objects that are right: boxes that reach over the edge are
            clipped, other objects that are not right are left out, and warnings name the first of each. Images and
            categories must be right in any case.
        evaluation: the objects are the ground truth, which is never changed: with "skip", objects that are not right
            stay as the file has them, and count as in COCO's own evaluation.

    Raises:
        AnnotationError: an entry is not right; the first one is named. With "skip" and `evaluation`, an object cannot
            be counted: its box is not of four finite numbers, or its mask cannot be read although `masks` is true.
        FileNotFoundError: the file itself is missing.
    """
    content = _content(file)
    if masks:
        _check_any_segmentation(file, content["annotations"])
    categories, merged = _categories(file, content)
    images = _images(file, content, image_folder)
    objects: dict[int, list[ObjectEntry]] = {image: [] for image in images}
    seen: set[int] = set()
    problems: list[AnnotationError] = []
    clipped: list[str] = []
    for entry in _entries(file, content, "annotations"):
        category = entry.number("category_id")
        if category in merged:
            entry.fields["category_id"] = merged[category]
        number = entry.number("image_id")
        image = None if number is None else images.get(number)
        if on_error == "skip" and not evaluation and image is not None:
            what = clip(entry, image)
            clipped += [] if what is None else [what]
        try:
            seen.add(entry.new_id(seen))
            if image is None:
                known = "an image's id" if number is None else "the id of an image of this file"
                raise entry.error("image_id", known, entry.fields.get("image_id"))
            objects[image.id].append(object_of(entry, image, categories, masks))
        except AnnotationError as error:
            if on_error == "raise":
                raise
            problems.append(error)
            if evaluation and image is not None and entry.number("category_id") in categories:
                objects[image.id].append(truth_of(entry, image, masks))
    _warn("clipped {} boxes", clipped)
    _warn("evaluated {} objects as they are" if evaluation else "left out {} objects", problems)
    return Annotations(list(images.values()), categories, objects)


def _content(file: Path) -> dict[str, Any]:
    """The file's JSON object, whose three parts are lists."""
    try:
        content = json.loads(read_text(file))
    except (ValueError, RecursionError) as error:  # the latter of lists in lists in lists
        raise AnnotationError(f"{file} must be JSON, got {error}") from error
    if not isinstance(content, dict):
        raise AnnotationError(f"{file} must hold an object with images, categories and annotations")
    for part in ("images", "categories", "annotations"):
        if not isinstance(content.get(part), list):
            raise AnnotationError(
                f"{file}: {part} must be a list, got {shown(content.get(part))}; data.annotations must name a file in "
                "COCO's format for objects"
            )
    return content


def _check_any_segmentation(file: Path, objects: list[Any]) -> None:
    """Refuses a file of boxes alone."""
    found = [one for one in objects if isinstance(one, dict)]
    if found and not any(one.get("segmentation") for one in found):
        raise AnnotationError(
            f"{file}: an object must have a segmentation, because data.masks is true, got {len(found)} boxes without; "
            "faster_rcnn_rednetv2_50_fpn is a recipe for boxes"
        )


def _categories(file: Path, content: dict[str, Any]) -> tuple[dict[int, str], dict[int, int]]:
    """Names by id, sorted by id, and the ids of categories that are merged into others.

    In Roboflow's exports the project is a category too, and the supercategory of all others. Where a class has the
    project's name, the two are one category.
    """
    found = [(entry, entry.text("name", "a name")) for entry in _entries(file, content, "categories")]
    used = {Entry(file, "", 0, one).number("category_id") for one in content["annotations"] if isinstance(one, dict)}
    projects = {name for entry, name in found if entry.fields.get("supercategory") == name}
    kept = {name: entry.number("id") for entry, name in found}  # of several, the last one with objects, or the last
    kept |= {name: entry.number("id") for entry, name in found if entry.number("id") in used}
    ids: set[int] = set()
    categories: dict[int, str] = {}
    merged: dict[int, int] = {}
    for entry, name in found:
        number = entry.new_id(ids)
        ids.add(number)
        main = kept[name]
        if number != main and main is not None and (number not in used or name in projects):
            merged[number] = main
            continue
        entry.check(name.strip() != "" and name not in categories.values(), "name", "a new name", name)
        categories[number] = name
    return dict(sorted(categories.items())), merged


def _images(file: Path, content: dict[str, Any], folder: Path) -> dict[int, ImageEntry]:
    images: dict[int, ImageEntry] = {}
    names: set[str] = set()
    for entry in _entries(file, content, "images"):
        image = image_of(entry, folder, names)
        names.add(image.file)
        images[entry.new_id(images)] = image
    return images


def _entries(file: Path, content: dict[str, Any], part: str) -> Iterator[Entry]:
    return (Entry(file, part, index, fields) for index, fields in enumerate(content[part]))


def _warn(what: str, problems: list[Any]) -> None:
    if problems:
        text = f"{what.format(len(problems))}, the first: {problems[0]}"
        warnings.warn(text, RuntimeWarning, stacklevel=3)
