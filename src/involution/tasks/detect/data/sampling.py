"""Batches of images of one orientation."""

from collections.abc import Sequence
from typing import Any

from involution.engine.sampling import ResumableSampler


class GroupedSampler(ResumableSampler):
    """Batches of images that are all wide or all tall, so that little of a batch is padding.

    Each process groups its own part. An epoch ends with the images that do not fill a batch of their kind.

    Args:
        wide: whether each image is wide.
        batch_size: images per batch.
        **resumable: see `ResumableSampler`.
    """

    def __init__(self, wide: Sequence[bool], batch_size: int, **resumable: Any) -> None:
        super().__init__(**resumable)
        self._wide, self._batch_size = wide, batch_size

    def order(self) -> list[int]:
        """This process's indices of the epoch."""
        ordered: list[int] = []
        waiting: dict[bool, list[int]] = {True: [], False: []}
        for index in super().order():
            kind = waiting[self._wide[index]]
            kind.append(index)
            if len(kind) == self._batch_size:
                ordered += kind
                kind.clear()
        return ordered + waiting[True] + waiting[False]
