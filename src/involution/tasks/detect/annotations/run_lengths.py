"""Masks of objects as arrays and as COCO's run lengths, by faster-coco-eval."""

from typing import Any

import numpy as np
from faster_coco_eval.core import mask as _coco
from torch import Tensor

from .entries import ObjectEntry

RunLengths = dict[str, Any]  # size [height, width], and counts, compressed as ASCII text


def encode(mask: Tensor) -> RunLengths:
    """A mask [H, W] of any dtype, nonzero inside the object -> its compressed run lengths."""
    return _as_text(_coco.encode(np.asfortranarray((mask != 0).byte().cpu().numpy())))


def decode(runs: RunLengths) -> Any:
    """Compressed run lengths -> a mask [H, W] of 0 and 1, as a uint8 array."""
    return _coco.decode(runs)


def area(runs: RunLengths) -> float:
    """How many pixels are inside."""
    return float(_coco.area(runs))


def runs_of(entry: ObjectEntry, size: tuple[int, int]) -> RunLengths:
    """The mask of an object, whose polygons are in an image of this height and width."""
    shape = entry.segmentation
    if isinstance(shape, list):
        return _as_text(_coco.merge(_coco.frPyObjects(shape, *size)))
    return shape if isinstance(shape["counts"], str) else _as_text(_coco.frPyObjects(shape, *size))


def mask_of(entry: ObjectEntry, size: tuple[int, int]) -> Any:
    """An object's mask, [H, W] of 0 and 1, as a uint8 array."""
    return decode(runs_of(entry, size))


def _as_text(runs: Any) -> RunLengths:
    counts = runs["counts"]
    return {"size": list(runs["size"]), "counts": counts.decode("ascii") if isinstance(counts, bytes) else counts}
