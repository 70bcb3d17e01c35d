"""Listing folders without hidden entries, and reading text files with a byte order mark or other line ends."""

from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath


def is_hidden(path: str | Path) -> bool:
    """Whether a relative path has a component whose name begins with a dot, such as .ipynb_checkpoints or ._a.jpg."""
    return any(part.startswith(".") and part not in (".", "..") for part in PurePosixPath(path).parts)


def entries(folder: Path) -> list[Path]:
    """The entries of a folder, sorted by name; hidden ones are skipped."""
    return sorted(path for path in folder.iterdir() if not is_hidden(path.name))


def files_below(folder: Path, endings: Sequence[str]) -> Iterator[Path]:
    """All files below a folder with one of the endings (in any case), sorted; hidden files and folders are skipped."""
    for path in entries(folder):
        if path.is_dir():
            yield from files_below(path, endings)
        elif path.suffix.lower() in endings and path.is_file():
            yield path


def decode(content: bytes, name: object) -> str:
    """Decodes UTF-8 with or without a byte order mark; every line end becomes a newline.

    Args:
        content: of a file.
        name: the file's name in errors.

    Raises:
        ValueError: the content is not UTF-8.
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
