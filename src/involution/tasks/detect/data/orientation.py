"""EXIF orientations: whether boxes are in the pixels of upright images or of images as they are stored."""

from collections.abc import Mapping

from lightning.pytorch.utilities import rank_zero_warn

from involution.engine.images import Header

from ..annotations import AnnotationError, ImageEntry
from .images import Split


def are_upright(split: Split, headers: Mapping[int, Header], orientation: str) -> bool:
    """Whether boxes are in the pixels of upright images, as EXIF turns them, or of images as they are stored.

    The annotation file's sizes tell it where an image is turned by 90 degrees. Without such an image the answer is
    upright, with a warning if any image has an orientation.

    Args:
        split: the images and annotations.
        headers: of the images, by id.
        orientation: "auto" to follow the sizes, or "upright" or "stored", which the sizes must not contradict.

    Raises:
        AnnotationError: sizes contradict each other, or `orientation`.
    """
    examples: dict[str, ImageEntry] = {}
    turned = []
    for entry in split.annotations.images:
        header = headers.get(entry.id)
        if header is None or header.orientation == 1:
            continue
        turned.append(entry.file)
        size = entry.width, entry.height
        if header.size != header.upright_size and size in (header.size, header.upright_size):
            examples.setdefault("upright" if size == header.upright_size else "stored", entry)
    wanted = set(examples) if orientation == "auto" else {*examples, orientation}
    if len(wanted) > 1:
        shown = " and ".join(f"{kind} images in {split.folder / entry.file}" for kind, entry in examples.items())
        raise AnnotationError(
            f"orientation must be that of the annotation file's sizes, got {orientation!r}, and sizes of {shown}"
        )
    if turned and not wanted:
        rank_zero_warn(
            f"{len(turned)} images in {split.folder} have an EXIF orientation, {turned[0]} the first, and no size "
            "tells whether boxes are in upright or stored pixels: upright is assumed; data.orientation sets it"
        )
    return "stored" not in wanted
