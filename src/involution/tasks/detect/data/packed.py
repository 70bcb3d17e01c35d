"""Annotations of many objects in little memory: arrays in the place of Python objects.

An object of COCO's takes about 2 kB as Python objects, and a forked worker copies the memory of each that it looks at,
for looking at one writes its reference count. Arrays have one count each, and processes go on sharing them.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain

import numpy as np

from .annotations import Annotations, ObjectEntry

_ROW = np.dtype([("id", "i8"), ("category", "i8"), ("box", "f8", 4), ("crowd", "?"), ("area", "f8")])


class PackedObjects(Mapping[int, list[ObjectEntry]]):
    """Objects by image, as in `Annotations`; an image's are made when they are asked for.

    Args:
        objects: to pack.
        segmentations: keep them, as JSON; without, every object's is None.
    """

    def __init__(self, objects: Mapping[int, Sequence[ObjectEntry]], segmentations: bool) -> None:
        self._images = np.fromiter(objects, np.int64, len(objects))
        self._order = self._images.argsort()
        counts = np.fromiter(map(len, objects.values()), np.int64, len(objects))
        self._starts = np.concatenate([[0], counts.cumsum()])
        total = int(self._starts[-1])
        rows = ((one.id, one.category, one.box, one.crowd, one.area) for one in chain.from_iterable(objects.values()))
        self._rows = np.fromiter(rows, _ROW, total)
        self._text = np.zeros(0, np.uint8)
        self._places: np.ndarray | None = None  # where each object's segmentation begins in the text, and the end
        if segmentations:
            text, places = bytearray(), np.zeros(total + 1, np.int64)
            for index, one in enumerate(chain.from_iterable(objects.values())):
                text += json.dumps(one.segmentation, separators=(",", ":")).encode()
                places[index + 1] = len(text)
            self._text, self._places = np.frombuffer(bytes(text), np.uint8), places

    @property
    def nbytes(self) -> int:
        """The memory that it takes."""
        arrays = (self._images, self._order, self._starts, self._rows, self._text, self._places)
        return sum(array.nbytes for array in arrays if array is not None)

    def __len__(self) -> int:
        return len(self._images)

    def __iter__(self) -> Iterator[int]:
        return iter(self._images.tolist())

    def __getitem__(self, image: int) -> list[ObjectEntry]:
        place = int(np.searchsorted(self._images, image, sorter=self._order))
        if place == len(self._images) or self._images[self._order[place]] != image:
            raise KeyError(image)
        first, last = self._starts[self._order[place] :][:2].tolist()
        found = []
        for index, row in enumerate(self._rows[first:last], start=first):
            number, category, box, crowd, area = row.item()
            shape = None if self._places is None else self._segmentation(index, self._places)
            found.append(ObjectEntry(number, category, tuple(box.tolist()), crowd, shape, area))
        return found

    def _segmentation(self, index: int, places: np.ndarray) -> object:
        return json.loads(self._text[places[index] : places[index + 1]].tobytes())


def packed(annotations: Annotations, segmentations: bool) -> Annotations:
    """The same annotations, their objects packed, and without segmentations if they are not asked for."""
    return annotations._replace(objects=PackedObjects(annotations.objects, segmentations))
