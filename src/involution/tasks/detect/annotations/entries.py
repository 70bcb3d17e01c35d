"""What an annotation file holds: images, categories and objects; and one entry of it, whose errors name it."""

import random
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple


class ImageEntry(NamedTuple):
    """An image: its file (below the image folder) and its size in pixels."""

    id: int
    file: str
    width: int
    height: int


class ObjectEntry(NamedTuple):
    """An object: its box as (left, top, width, height) in pixels, and COCO's polygons or run lengths, or None.

    Its area, in square pixels, is the file's, or the box's where the file has none.
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
    """A file's content: images, names of categories by id, and objects by image id (an empty list for no objects).

    Categories are sorted by id, whatever the order in the file, so that labels, which count them, are the same in all
    parts of the data.
    """

    images: list[ImageEntry]
    categories: dict[int, str]
    objects: Mapping[int, list[ObjectEntry]]

    def only(self, names: Sequence[str]) -> "Annotations":
        """The same images with the objects of some categories.

        Raises:
            ValueError: a name is unknown, or there is none.
        """
        ids = {name: category for category, name in self.categories.items()}
        missing = [name for name in names if name not in ids]
        if missing or not names:
            raise ValueError(f"categories must be some of {', '.join(ids)}, got {missing or 'none'}")
        kept = {ids[name]: name for name in names}
        objects = {image: [one for one in found if one.category in kept] for image, found in self.objects.items()}
        return Annotations(self.images, kept, objects)

    def part(self, fraction: float, held_out: bool) -> "Annotations":
        """A random fraction of the images (always the same ones, at least one) if `held_out`, else the other images."""
        chosen = set(random.Random(0).sample(range(len(self.images)), max(1, round(fraction * len(self.images)))))
        images = [one for index, one in enumerate(self.images) if (index in chosen) == held_out]
        return Annotations(images, self.categories, {one.id: self.objects[one.id] for one in images})


class AnnotationError(ValueError):
    """An annotation file, or an entry of it, is not in COCO's format; the message names the entry."""


class Entry:
    """One entry of a list of the file.

    Args:
        file: the annotation file.
        part: images, categories or annotations.
        index: of the entry in that list.
        fields: of the entry; `number` replaces whole numbers with a decimal point by integers.

    Raises:
        AnnotationError: the entry is no JSON object; also raised by the methods, for a field.
    """

    __slots__ = ("_place", "fields")  # there can be a million of them

    def __init__(self, file: Path, part: str, index: int, fields: Any) -> None:
        self._place = file, part, index
        if not isinstance(fields, dict):
            raise AnnotationError(f"{file}: {part}[{index}] must be an object, got {shown(fields)}")
        self.fields: dict[str, Any] = fields

    @property
    def name(self) -> str:
        """What errors call the entry."""
        file, part, index = self._place
        return f"{file}: {part}[{index}] (id {shown(self.fields.get('id'))})"

    def error(self, field: str, wanted: str, got: Any) -> AnnotationError:
        """The error of a field."""
        return AnnotationError(f"{self.name}: {field} must be {wanted}, got {shown(got)}")

    def check(self, right: bool, field: str, wanted: str, got: Any) -> None:
        """Raises the error of a field that is not right."""
        if not right:
            raise self.error(field, wanted, got)

    def number(self, field: str) -> int | None:
        """An integer, or None where the field holds something else; some tools write 64.0."""
        found = self.fields.get(field)
        if isinstance(found, float) and found.is_integer():
            found = self.fields[field] = int(found)
        return found if isinstance(found, int) and not isinstance(found, bool) else None

    def integer(self, field: str, wanted: str) -> int:
        """An integer."""
        found = self.number(field)
        if found is None:
            raise self.error(field, wanted, self.fields.get(field))
        return found

    def text(self, field: str, wanted: str) -> str:
        """A string."""
        found = self.fields.get(field)
        if not isinstance(found, str):
            raise self.error(field, wanted, found)
        return found

    def new_id(self, known: Collection[int]) -> int:
        """The entry's id, which no other entry of the list may have."""
        found = self.integer("id", "an integer")
        self.check(found not in known, "id", "one that no other entry has", found)
        return found


def shown(value: Any) -> str:
    """A value as errors print it, shortened to 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
