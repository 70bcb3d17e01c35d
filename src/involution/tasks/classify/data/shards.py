"""Shards: tar files of images and labels, as webdataset writes them, for file systems that dislike small files."""

import io
import tarfile
from collections.abc import Callable
from glob import glob
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import v2

from involution.engine.files import decode, is_hidden, read_lines
from involution.engine.images import read_image

from .image_folder import Photographs


class TarImages(Dataset[Any]):
    """The samples of some tar files, read at random: KEY.jpg (or another image) beside KEY.cls, a class as a number.

    Making it reads all headers and all labels once; after that a sample is one read at a known place, so any order of
    samples is as good as another, and a sampler decides it.

    Args:
        files: the tar files, uncompressed.
        num_classes: labels must be below it.
        transform: called with every image.

    Raises:
        ValueError: a file is no tar file or holds no sample; a sample lacks its image or its label; a label is no
            number from 0 to num_classes - 1.
    """

    def __init__(self, files: list[Path], num_classes: int, transform: Callable[[Any], Any]) -> None:
        self.files, self.transform = files, transform
        places: list[tuple[int, int, int, int]] = []  # file, offset, size and label of every image
        names: list[str] = []
        for number, file in enumerate(files):
            try:
                found = _samples(file)
            except (tarfile.TarError, OSError) as error:
                raise ValueError(f"{file} cannot be read as a tar file: {error}") from error
            if not found:
                raise ValueError(f"{file} holds no sample: it wants KEY.jpg beside KEY.cls")
            for key, parts in found.items():
                places.append((number, *_checked(f"{file}: {key}", parts, num_classes)))
                names.append(key)
        # Arrays, because workers would copy lists as they read them.
        self.places, self.names = np.array(places, dtype=np.int64), np.array(names)

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        number, offset, size, label = map(int, self.places[index])
        file = self.files[number]
        with file.open("rb") as stream:  # opened anew: a stream shared by forked workers would share its place
            stream.seek(offset)
            content = stream.read(size)
        image = read_image(io.BytesIO(content), f"{file}: {self.names[index]}")
        return self.transform(image), label


def _samples(file: Path) -> dict[str, dict[str, Any]]:
    """Key -> the image's place and the label's text, for all keys of a tar file."""
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
            folder, slash, name = member.name.rpartition("/")
            key, dot, kind = name.partition(".")  # webdataset's rule: the key ends at the first dot
            if not member.isfile() or not dot or is_hidden(member.name):
                continue
            if f".{kind.lower()}" in IMG_EXTENSIONS:
                note(folder + slash + key, "image", (member.offset_data, member.size))
            elif kind == "cls":
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
    """Images in shards: tar files as webdataset writes them, on a file system that this machine sees.

    They are read at random, in the order that (seed, epoch) decide, and not as streams: so an epoch is every image
    once, over any number of processes, and a resumed run goes on where it was.

    Args:
        train: a glob pattern of the training shards, such as /data/imagenet1k-train-*.tar.
        val: of the validation shards.
        classes: how many classes there are, or a text file with a class name in every line.
        test: of the test shards; None takes those of `val`.
        **photographs: see `Photographs`.

    Raises:
        FileNotFoundError: a pattern matches no file, or `classes` names none.
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
        files = [Path(file) for file in sorted(glob(pattern))]  # noqa: PTH207 (pathlib's wants a folder apart)
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
        raise FileNotFoundError(f"classes must be a number or a file with a name in every line, got {classes!r}")
    names = read_lines(file)
    if len(names) != len(set(names)):
        raise ValueError(f"classes must be different names, got {classes!r}, where some stand twice")
    if not names:
        raise ValueError(f"classes must be a file with a name in every line, got {classes!r}, which is empty")
    return names
