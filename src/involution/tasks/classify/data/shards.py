"""Shards: tar files of images and labels in webdataset's format, for file systems that are slow with small files."""

import io
import tarfile
from collections.abc import Callable
from glob import glob
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset
from torchvision.transforms import v2

from involution.engine.files import decode, is_hidden, read_lines
from involution.engine.images import ENDINGS, read_image

from .image_folder import Photographs


class TarImages(Dataset[Any]):
    """Random access to the samples of tar files: KEY.jpg (or another image) beside KEY.cls, a class index as text.

    The constructor reads all headers and labels once; a sample is then one read at a known offset, so any order is
    equally fast.

    Args:
        files: the tar files, uncompressed.
        num_classes: labels must be smaller.
        transform: of each image.

    Raises:
        ValueError: a file is no tar file or holds no sample; a sample lacks its image or its label; a label is no
            integer from 0 to num_classes - 1.
    """

    def __init__(self, files: list[Path], num_classes: int, transform: Callable[[Any], Any]) -> None:
        self.files, self.transform = files, transform
        places: list[tuple[int, int, int, int]] = []  # file, offset, size and label of every image
        names: list[str] = []
        for number, file in enumerate(files):
            try:
                found = _samples(file)
            except (tarfile.TarError, OSError, RecursionError, MemoryError) as error:
                raise ValueError(f"{file} cannot be read as a tar file: {error}") from error
            if not found:
                raise ValueError(f"{file} must hold samples, KEY.jpg beside KEY.cls, got none")
            for key, parts in found.items():
                places.append((number, *_checked(f"{file}: {key}", parts, num_classes)))
                names.append(key)
        # Arrays, because reading lists makes forked workers copy them (reference counts).
        self.places, self.names = np.array(places, dtype=np.int64), np.array(names)

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        number, offset, size, label = map(int, self.places[index])
        file = self.files[number]
        with file.open("rb") as stream:  # opened per read: forked workers would share a stream's position
            stream.seek(offset)
            content = stream.read(size)
        image = read_image(io.BytesIO(content), f"{file}: {self.names[index]}")
        return self.transform(image), label


_LABEL = 64  # bytes of a label's file: a number, with spaces


def _samples(file: Path) -> dict[str, dict[str, Any]]:
    """Key -> offset and size of the image, and text of the label, for all keys of a tar file."""
    found: dict[str, dict[str, Any]] = {}
    with file.open("rb") as stream:
        stream.seek(max(0, file.stat().st_size - 1024))
        if any(stream.read()) or file.stat().st_size < 1024:
            raise tarfile.ReadError("it does not end as tar files do, with zeros")

    def note(key: str, part: str, value: Any) -> None:
        if part in found.setdefault(key, {}):
            raise ValueError(f"{file}: {key} has two {part}s")
        found[key][part] = value

    with tarfile.open(file, "r:") as archive:
        for member in archive:
            if member.size < 0:  # which would lead back to the same header, for ever
                raise tarfile.ReadError(f"{member.name} has a size of {member.size}")
            folder, slash, name = member.name.rpartition("/")
            key, dot, kind = name.partition(".")  # webdataset's rule: the key ends at the first dot
            if not member.isfile() or not dot or is_hidden(member.name):
                continue
            if f".{kind.lower()}" in ENDINGS:
                note(folder + slash + key, "image", (member.offset_data, member.size))
            elif kind == "cls":
                if member.size > _LABEL:
                    raise ValueError(f"{file}: {member.name} must be a number of at most {_LABEL} bytes")
                content: Any = archive.extractfile(member)
                note(folder + slash + key, "label", content.read())
    return found


def _checked(name: str, parts: dict[str, Any], num_classes: int) -> tuple[int, int, int]:
    for part, ending in (("image", "jpg"), ("label", "cls")):
        if part not in parts:
            raise ValueError(f"{name} has no {part} (.{ending})")
    try:
        label = int(decode(parts["label"], name))
    except ValueError:
        label = -1
    if not 0 <= label < num_classes:
        raise ValueError(f"{name}: label must be a number from 0 to {num_classes - 1}, got {parts['label']!r}")
    return *parts["image"], label


class Shards(Photographs):
    """Images in shards: tar files in webdataset's format, on a mounted file system.

    Samples are read at random offsets, in an order that depends on (seed, epoch), not as streams: an epoch holds every
    image once, over any number of processes, and a resumed run continues at its position.

    Args:
        train: glob pattern of the training shards, such as /data/imagenet1k-train-*.tar.
        val: glob pattern of the validation shards.
        classes: the number of classes, or a text file with one class name per line.
        test: glob pattern of the test shards; None uses those of `val`.
        **photographs: see `Photographs`.

    Raises:
        FileNotFoundError: a pattern matches no file, or the file of `classes` does not exist.
        ValueError: shards or labels do not fit, see `TarImages`; another argument does not fit.
    """

    def __init__(
        self,
        train: str,
        val: str,
        classes: int | str,
        test: str | None = None,
        **photographs: Any,
    ) -> None:
        super().__init__(**photographs)
        self.patterns = {"train": train, "val": val, "test": test or val}
        self.classes = _class_names(classes)

    def _read(self, split: str, transform: v2.Transform) -> TarImages:
        pattern = self.patterns[split]
        files = [Path(file) for file in sorted(glob(pattern))]  # noqa: PTH207 (pathlib's needs a separate folder)
        if not files:
            raise FileNotFoundError(
                f"{split} must be a pattern of tar files, such as shards/{split}-*.tar, got {pattern!r}, which matches "
                "none"
            )
        return TarImages(files, self.num_classes, transform)


def _class_names(classes: int | str) -> list[str]:
    if isinstance(classes, int) or classes.isdigit():
        count = int(classes)
        if count < 1:
            raise ValueError(f"classes must be at least 1, got {classes!r}")
        return [str(number) for number in range(count)]
    file = Path(classes)
    if not file.is_file():
        raise FileNotFoundError(f"classes must be a number or a file with one name per line, got {classes!r}")
    names = read_lines(file)
    if len(names) != len(set(names)):
        raise ValueError(f"classes must be different names, got {classes!r}, where some occur twice")
    if not names:
        raise ValueError(f"classes must be a file with one name per line, got {classes!r}, which is empty")
    return names
