"""Hidden entries of folders, and text files with a byte order mark or other line ends."""

from pathlib import Path

import pytest

from involution.engine.files import decode, files_below, is_hidden, read_lines
from involution.engine.predict import image_files


def test_hidden_entries_are_skipped(tmp_path: Path) -> None:
    for name in ("b.JPG", "a/c.png", "a/._c.png", ".ipynb_checkpoints/b-checkpoint.jpg", ".DS_Store", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert list(files_below(tmp_path, (".jpg", ".png"))) == [tmp_path / "a/c.png", tmp_path / "b.JPG"]
    assert image_files(tmp_path) == [tmp_path / "a/c.png", tmp_path / "b.JPG"]


@pytest.mark.parametrize(
    ("path", "hidden"), [("a/.b/c", True), ("._a.jpg", True), ("./a.jpg", False), ("../a", False), ("a.b", False)]
)
def test_is_hidden(path: str, hidden: bool) -> None:
    assert is_hidden(path) == hidden


def test_text_with_a_byte_order_mark_and_other_line_ends(tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_bytes(b"\xef\xbb\xbfK\xc3\xbcche\r\n\r\ndog \rcow\n")
    assert read_lines(tmp_path / "names.txt") == ["Küche", "dog", "cow"]


def test_text_that_is_not_utf_8_is_named() -> None:
    with pytest.raises(ValueError, match=r"names\.txt must be text in UTF-8, got .*0xfc"):
        decode(b"K\xfcche", "names.txt")
