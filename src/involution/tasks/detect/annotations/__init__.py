"""COCO's annotation format: what a file holds, how it is read and checked, and how it is stored in little memory."""

from .entries import AnnotationError, Annotations, ImageEntry, ObjectEntry
from .reading import read_annotations

__all__ = ["AnnotationError", "Annotations", "ImageEntry", "ObjectEntry", "read_annotations"]
