"""Images, archives, recipes and annotation files made to harm: refused by name, in bounded time, nothing executed."""

import io
import json
import random
import resource
import struct
import tarfile
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from harness import examples
from PIL import Image

from involution.cli import main
from involution.engine.images import FORMATS, UnreadableImage, inspect, read_image
from involution.tasks.classify.data.shards import TarImages
from involution.tasks.detect.annotations.entries import AnnotationError
from involution.tasks.detect.annotations.reading import read_annotations


def memory() -> int:
    """The largest resident memory of this process so far, in kB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def png(width: int, height: int) -> bytes:
    """A grey PNG of zeros whose pixels are as small as deflate makes them; of large ones only the beginning."""
    rows = zlib.compress(bytes(min((width + 1) * height, 1 << 20)))
    parts = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)), (b"IDAT", rows), (b"IEND", b"")]
    chunks = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


@pytest.mark.parametrize("size", [(50_000, 50_000), (2**31 - 1, 2**31 - 1), (1, 2**31 - 1), (20_000, 9_500)])
def test_a_decompression_bomb_is_refused(size: tuple[int, int], tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(*size))
    before, start = memory(), time.perf_counter()
    with pytest.raises(UnreadableImage, match=r"a\.png cannot be read as an image"):
        read_image(tmp_path / "a.png")
    assert memory() - before < 100_000
    assert time.perf_counter() - start < 20


@pytest.mark.parametrize(
    ("size", "read"), [((1, 200), True), ((200, 1), True), ((1, 201), False), ((65_000, 2), False)]
)
def test_an_image_of_extreme_shape_is_refused(size: tuple[int, int], read: bool, tmp_path: Path) -> None:
    """Its shorter side would be resized to hundreds of pixels, and the longer one with it."""
    (tmp_path / "a.png").write_bytes(png(*size))
    if read:
        assert read_image(tmp_path / "a.png").size == size
        return
    message = (
        rf"a\.png cannot be read as an image: it must be at most 200 times as long as wide, got {size[0]}x{size[1]}"
    )
    with pytest.raises(UnreadableImage, match=message):
        read_image(tmp_path / "a.png")


@pytest.mark.parametrize("kind", FORMATS)
def test_damaged_images_are_refused_or_read(kind: str, tmp_path: Path) -> None:
    stream, numbers = io.BytesIO(), random.Random(kind)
    pixels = np.random.default_rng(0).integers(0, 256, (12, 9, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(stream, kind)
    good, before, count = stream.getvalue(), memory(), examples(30)
    for number in range(count):
        bad, kept = bytearray(good), numbers.randrange(len(good))
        for _ in range(numbers.choice([1, 2, 8])):
            bad[numbers.randrange(min(len(bad), 128))] ^= 1 << numbers.randrange(8)
        (tmp_path / "a").write_bytes(bad if number % 3 else good[:kept])
        start = time.perf_counter()
        for read in (read_image, inspect):
            try:
                read(tmp_path / "a")
            except UnreadableImage as error:
                message = str(error)
                assert str(tmp_path / "a") in message
        assert time.perf_counter() - start < 30, number
    assert memory() - before < 1_500_000  # an image may have 179 million pixels


def member(name: str, kind: bytes = tarfile.REGTYPE, size: int = 0, link: str = "") -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.size, info.linkname = kind, size, link
    return info.tobuf(tarfile.GNU_FORMAT)


END = bytes(1024)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (member("b.txt") + member("a.png", size=-512) + END, "a.png has a size of -512"),
        (member("a.cls", size=1 << 40) + END, "a.cls must be a number of at most 64 bytes"),
        (member("a.png", size=1 << 50) + END, "cannot be read as a tar file|must hold samples|has no label"),
        (member("x", tarfile.GNUTYPE_LONGNAME) * 3000 + END, "cannot be read as a tar file"),
        (member("x", tarfile.GNUTYPE_LONGNAME, size=1 << 60) + END, "cannot be read as a tar file"),
        (member("../../a.png", tarfile.SYMTYPE, link="/etc/passwd") + END, "must hold samples"),
        (member("a.cls", tarfile.LNKTYPE, link="/etc/passwd") + END, "must hold samples"),
        (member("a.png", tarfile.CHRTYPE) + END, "must hold samples"),
    ],
)
def test_archives_made_to_harm_are_refused(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    file = tmp_path / "shards" / "a.tar"
    file.write_bytes(content)
    start = time.perf_counter()
    with pytest.raises(ValueError, match=message):
        TarImages([file], 3, lambda image: image)
    assert time.perf_counter() - start < 20
    assert [path.name for path in tmp_path.rglob("*")] == ["shards", "a.tar"]


def test_no_member_of_an_archive_is_written(tmp_path: Path) -> None:
    """Members are read where they are, so that names above the root or absolute ones only name samples."""
    (tmp_path / "shards").mkdir()
    with tarfile.open(tmp_path / "shards" / "a.tar", "w") as archive:
        for name, content in (
            ("../../a.png", png(4, 4)),
            ("../../a.cls", b"1"),
            ("/b.png", png(4, 4)),
            ("/b.cls", b"2"),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    found = TarImages([tmp_path / "shards" / "a.tar"], 3, lambda image: image.size)
    assert [found[index] for index in range(len(found))] == [((4, 4), 1), ((4, 4), 2)]
    assert [path.name for path in tmp_path.rglob("*")] == ["shards", "a.tar"]
    assert not Path("/b.png").exists()


@pytest.mark.parametrize(
    "tag", ["python/object/apply:os.system", "python/object/new:os.system", "python/name:os.system"]
)
def test_a_recipe_constructs_no_objects(tag: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f'seed_everything: !!{tag} ["touch {tmp_path}/marker"]\n')
    with pytest.raises(SystemExit) as exit:
        main(["fit", "-c", str(recipe)])
    assert exit.value.code == 2
    assert "could not determine a constructor for the tag" in capsys.readouterr().err
    assert not (tmp_path / "marker").exists()


GOOD = {
    "images": [{"id": 1, "file_name": "a.png", "width": 40, "height": 30}],
    "categories": [{"id": 1, "name": "cat"}],
    "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4], "iscrowd": 0}],
}


def annotations(text: str, folder: Path) -> None:
    (folder / "a.png").write_bytes(png(40, 30))
    (folder / "a.json").write_text(text)
    read_annotations(folder / "a.json", folder, masks=True)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 1_000_000,
        '{"images": ' + "[" * 1_000_000,
        '{"a":' * 1_000_000,
        json.dumps(GOOD).replace('"id": 1', '"id": 1' + "0" * 1_000_000, 1),
        json.dumps({**GOOD, "images": [0] * 1_000_000}),
        json.dumps({**GOOD, "annotations": [{}] * 1_000_000}),
        json.dumps(GOOD).replace("40", "1" + "0" * 300),
        json.dumps(GOOD).replace('"bbox": [1', '"segmentation": {"size": [30, 40], "counts": [1e999]}, "bbox": [1'),
        json.dumps(GOOD).replace('"bbox": [1', '"segmentation": {"size": [30, 40], "counts": []}, "bbox": [1e999'),
    ],
    ids=range(9),
)
def test_absurd_annotation_files_are_refused(text: str, tmp_path: Path) -> None:
    before, start = memory(), time.perf_counter()
    with pytest.raises(AnnotationError, match=r"a\.json"):
        annotations(text, tmp_path)
    assert time.perf_counter() - start < 30
    assert memory() - before < 600_000
