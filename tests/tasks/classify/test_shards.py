"""Tar files of images in webdataset's format."""

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from involution.tasks.classify import Shards
from involution.tasks.classify.data.shards import TarImages


def png(number: int) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.full((4, 5, 3), number, dtype=np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def write(file: Path, members: Iterable[tuple[str, bytes]]) -> Path:
    with tarfile.open(file, "w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return file


def samples(numbers: Iterable[int]) -> list[tuple[str, bytes]]:
    """Image i has grey level i and class i % 3; each sample also has a json file."""
    parts = []
    for i in numbers:
        parts += [(f"{i:03}.png", png(i)), (f"{i:03}.cls", str(i % 3).encode()), (f"{i:03}.json", b"{}")]
    return parts


def level(image: Image.Image) -> int:
    return np.asarray(image)[0, 0, 0].item()


def test_samples_are_read_in_any_order(tmp_path: Path) -> None:
    files = [write(tmp_path / f"{part}.tar", samples(range(5 * part, 5 * part + 5))) for part in range(3)]
    found = TarImages(files, 3, level)
    assert len(found) == 15
    order = torch.randperm(15).tolist()
    assert [found[i] for i in order] == [(i, i % 3) for i in order]


def test_shards_by_webdatasets_own_writer(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as sink:
        for i in range(4):
            sink.write({"__key__": f"some/folder/{i}", "png": png(i), "cls": i % 2})
    assert [TarImages([tmp_path / "a.tar"], 2, level)[i] for i in range(4)] == [(i, i % 2) for i in range(4)]


def test_hidden_members_are_skipped(tmp_path: Path) -> None:
    """macOS adds a ._ file for every file to an archive."""
    hidden = [(f"./._{name}", b"\0\5\x16\7") for name, _ in samples(range(2))]
    file = write(tmp_path / "mac.tar", [*hidden, *samples(range(2))])
    read = TarImages([file], 3, lambda image: image)
    assert [level(image) for image, _ in map(read.__getitem__, range(len(read)))] == [0, 1]


def test_two_keys_in_two_folders_are_two(tmp_path: Path) -> None:
    parts = [("a/1.png", png(7)), ("a/1.cls", b"0"), ("b/1.cls", b"1"), ("b/1.seg.png", b""), ("b/1.png", png(9))]
    found = TarImages([write(tmp_path / "a.tar", parts)], 2, level)
    assert [found[0], found[1]] == [(7, 0), (9, 1)]


def data(tmp_path: Path, **options: object) -> Shards:
    for split, numbers in (("train", range(8)), ("val", range(8, 12))):
        write(tmp_path / f"set-{split}-00.tar", samples(numbers))
    made: dict = {"classes": 3, "batch_size": 4, "num_workers": 0, "image_size": 8, "resize": 9, **options}
    return Shards(str(tmp_path / "set-train-*.tar"), str(tmp_path / "set-val-*.tar"), **made)


@pytest.mark.parametrize("workers", [0, 2])
def test_loaders(tmp_path: Path, workers: int) -> None:
    shards = data(tmp_path, num_workers=workers)
    shards.setup("fit")
    shards.setup("test")
    labels = torch.cat([labels for _, labels in shards.train_dataloader()])
    assert sorted(labels.tolist()) == sorted(i % 3 for i in range(8))
    [(images, labels)] = shards.val_dataloader()
    assert images.shape == (4, 3, 8, 8)
    assert labels.tolist() == [8 % 3, 9 % 3, 10 % 3, 11 % 3]
    [(tested, _)] = shards.test_dataloader()
    assert torch.equal(tested, images)


def test_class_names_from_a_file(tmp_path: Path) -> None:
    names = tmp_path / "names.txt"
    names.write_text("tench\ngreat white shark\n\ncock\n")
    assert data(tmp_path, classes=str(names)).classes == ["tench", "great white shark", "cock"]
    assert data(tmp_path, classes="3").num_classes == 3


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([], r"a\.tar must hold samples, KEY.jpg beside KEY.cls, got none"),
        ([("1.txt", b"")], r"a\.tar must hold samples, KEY.jpg beside KEY.cls, got none"),
        ([("1.png", png(1)), ("1.jpg", png(1)), ("1.cls", b"1")], r"a\.tar: 1 has two images"),
        ([("1.png", png(1)), ("1.cls", b"1"), ("1.cls", b"1")], r"a\.tar: 1 has two labels"),
        ([("1.png", png(1))], r"a\.tar: 1 has no label \(\.cls\)"),
        ([("1.cls", b"1")], r"a\.tar: 1 has no image \(\.jpg\)"),
        ([("1.png", png(1)), ("1.cls", b"3")], r"a\.tar: 1: label must be a number from 0 to 2, got b'3'"),
        ([("1.png", png(1)), ("1.cls", b"-1")], r"a\.tar: 1: label must be a number from 0 to 2, got b'-1'"),
        ([("1.png", png(1)), ("1.cls", b"cat")], r"a\.tar: 1: label must be a number from 0 to 2, got b'cat'"),
    ],
)
def test_errors_are_named_before_training(members: list, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        TarImages([write(tmp_path / "a.tar", members)], 3, level)


def test_files_that_are_no_shards(tmp_path: Path) -> None:
    (tmp_path / "set-train-01.tar").write_bytes(b"no tar file")
    with pytest.raises(ValueError, match=r"set-train-01\.tar cannot be read as a tar file"):
        data(tmp_path).setup("fit")
    missing = Shards(str(tmp_path / "no-*.tar"), str(tmp_path / "no-*.tar"), 3)
    with pytest.raises(FileNotFoundError, match=r"train must be a pattern of tar files, such as .* got .*no-\*\.tar"):
        missing.setup("fit")
    with pytest.raises(FileNotFoundError, match="classes must be a number or a file"):
        data(tmp_path, classes="names.txt")
    (tmp_path / "twice.txt").write_text("cat\ndog\ncat\n")
    with pytest.raises(ValueError, match="classes must be different names"):
        data(tmp_path, classes=str(tmp_path / "twice.txt"))
    with pytest.raises(ValueError, match="classes must be at least 1, got 0"):
        data(tmp_path, classes=0)


def test_a_shard_cut_between_two_members_is_named(tmp_path: Path) -> None:
    whole = write(tmp_path / "a.tar", samples(range(4))).read_bytes()
    with tarfile.open(tmp_path / "a.tar") as archive:
        cut = archive.getmembers()[6].offset
    (tmp_path / "a.tar").write_bytes(whole[:cut])
    with pytest.raises(ValueError, match=r"a\.tar cannot be read as a tar file: it does not end as tar files do"):
        TarImages([tmp_path / "a.tar"], 3, level)


def test_a_broken_image_is_named_or_left_out_of_training(tmp_path: Path) -> None:
    file = str(write(tmp_path / "a.tar", [("000.png", b"no image"), ("000.cls", b"0"), *samples([1])]))
    for on_error in ("raise", "skip"):
        shards = Shards(file, file, 3, num_workers=0, batch_size=2, on_error=on_error)
        shards.setup("fit")
        with pytest.raises(ValueError, match=r"a\.tar: 000 cannot be read as an image"):
            list(shards.val_dataloader())
    with pytest.warns(RuntimeWarning, match=r"skipped: .*000 cannot be read"):
        [(_, labels)] = shards.train_dataloader()
    assert labels.tolist() == [1, 1]
    with pytest.warns(UserWarning, match="1 files could not be read and were skipped"):
        shards.teardown("fit")
