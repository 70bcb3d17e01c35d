"""Folders and text files as people's computers leave them: hidden entries, byte order marks, other line ends."""

from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath


def is_hidden(path: str | Path) -> bool:
    """Whether a relative path has a component whose name begins with a dot, such as .ipynb_checkpoints or ._a.jpg."""
    return any(part.startswith(".") and part not in (".", "..") for part in PurePosixPath(path).parts)


def entries(folder: Path) -> list[Path]:
    """What is in a folder, sorted by name; hidden entries are skipped."""
    return sorted(path for path in folder.iterdir() if not is_hidden(path.name))


def files_below(folder: Path, endings: Sequence[str]) -> Iterator[Path]:
    """All files below a folder that end so (in lower or upper case), sorted; hidden files and folders are skipped."""
    for path in entries(folder):
        if path.is_dir():
            yield from files_below(path, endings)
        elif path.suffix.lower() in endings and path.is_file():
            yield path


def decode(content: bytes, name: object) -> str:
    """UTF-8 with or without a byte order mark; every line end becomes a newline.

    Args:
        content: of the file.
        name: what errors call it.

    Raises:
        ValueError: it is not UTF-8.
    """
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} must be text in UTF-8, got {error}") from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_text(file: Path) -> str:
    """A text file's content: see `decode`."""
    return decode(file.read_bytes(), file)


def read_lines(file: Path) -> list[str]:
    """A text file's lines, stripped; empty ones are left out."""
    return [line.strip() for line in read_text(file).split("\n") if line.strip()]
