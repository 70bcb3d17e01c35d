"""Atomic writing: a file is complete or absent, whenever the process or the machine stops."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_write(target: Path) -> Iterator[Path]:
    """Yields the path of a temporary file beside `target`, which is flushed to the disk and renamed to it afterwards.

    Missing folders are made. After an error the temporary file is removed, and an earlier `target` is unchanged; an
    OSError that names no file, as those of writing do, is given the target's name.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.part")
    try:
        yield part
        _flush(part)
        part.replace(target)
    except OSError as error:
        error.filename = error.filename or str(target)
        raise
    finally:
        part.unlink(missing_ok=True)
    _flush(target.parent)  # makes the rename durable


def _flush(path: Path) -> None:
    """Waits until a file's contents, or a folder's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
