"""Annotations of many objects in little memory: arrays instead of Python objects.

An object takes about 2 kB as Python objects, and a forked worker copies the memory of every one that it reads, because
reading writes the reference count. An array has one reference count, so processes keep sharing its memory.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain

import numpy as np

from .entries import Annotations, ObjectEntry

_ROW = np.dtype([("id", "i8"), ("category", "i8"), ("box", "f8", 4), ("crowd", "?"), ("area", "f8")])


class PackedObjects(Mapping[int, list[ObjectEntry]]):
    """Objects by image id, as in `Annotations`; the `ObjectEntry`s of an image are made on access.

    Args:
        objects: to pack.
        segmentations: store them, as JSON text; if false, every object's is None.
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
        self._offsets: np.ndarray | None = None  # of each object's segmentation in the text, and the text's length
        if segmentations:
            text, offsets = bytearray(), np.zeros(total + 1, np.int64)
            for index, one in enumerate(chain.from_iterable(objects.values())):
                text += json.dumps(one.segmentation, separators=(",", ":")).encode()
                offsets[index + 1] = len(text)
            self._text, self._offsets = np.frombuffer(bytes(text), np.uint8), offsets

    @property
    def nbytes(self) -> int:
        """The memory of all arrays, in bytes."""
        arrays = (self._images, self._order, self._starts, self._rows, self._text, self._offsets)
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
            shape = None if self._offsets is None else self._segmentation(index, self._offsets)
            found.append(ObjectEntry(number, category, tuple(box.tolist()), crowd, shape, area))
        return found

    def _segmentation(self, index: int, offsets: np.ndarray) -> object:
        return json.loads(self._text[offsets[index] : offsets[index + 1]].tobytes())


def packed(annotations: Annotations, segmentations: bool) -> Annotations:
    """The same annotations with packed objects, whose segmentations are None if `segmentations` is false."""
    return annotations._replace(objects=PackedObjects(annotations.objects, segmentations))
