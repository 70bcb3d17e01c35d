"""Image files with EXIF orientation, of other modes, of 16 bits, damaged."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset

from involution.engine.images import (
    ENDINGS,
    FORMATS,
    Header,
    SkipUnreadable,
    UnreadableImage,
    for_each,
    inspect,
    read_image,
)
from involution.engine.predict import image_files
from involution.tasks.classify import ImageFolder
from involution.tasks.segment import Folders


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    wide = Image.fromarray(np.arange(6, dtype=np.uint8).reshape(2, 3) * 40).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    wide.save(tmp_path / "turned.png", exif=exif)
    got = read_image(tmp_path / "turned.png")
    assert got.size == (2, 3)
    assert (pixels(got)[..., 0] == np.rot90(pixels(wide)[..., 0], -1)).all()


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1"])
def test_modes_become_rgb(mode: str, tmp_path: Path) -> None:
    image = Image.new("RGB", (5, 4), (200, 200, 200)).convert(mode)
    file = tmp_path / ("image.tif" if mode == "CMYK" else "image.png")
    image.save(file)
    got = read_image(file)
    assert got.mode == "RGB"
    assert got.size == (5, 4)
    assert abs(pixels(got) - pixels(image.convert("RGB"))).max() == 0


def test_sixteen_bits_are_scaled_and_not_clipped(tmp_path: Path) -> None:
    deep = np.array([[0, 256, 32768, 65535]], dtype=np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    assert pixels(read_image(tmp_path / "deep.png"))[0, :, 0].tolist() == [0, 1, 128, 255]


@pytest.mark.parametrize("content", [b"", b"no image at all", None])
def test_a_broken_file_is_named(content: bytes | None, tmp_path: Path) -> None:
    file = tmp_path / "broken.jpg"
    if content is None:  # cut off in the midst
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(file)
        content = file.read_bytes()[:1500]
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"broken\.jpg cannot be read as an image"):
        read_image(file)


def tree(root: Path) -> Path:
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            (root / split / name).mkdir(parents=True)
            for index in range(3):
                Image.new("RGB", (40, 40), (index * 50, 0, 0)).save(root / split / name / f"{index}.png")
    (root / "train" / "cat" / "1.png").write_bytes(b"broken")
    return root


def test_broken_files_raise_or_are_skipped_and_counted(tmp_path: Path) -> None:
    """While reading, where files are not checked first."""
    root, unchecked = tree(tmp_path), {"batch_size": 2, "image_size": 32, "check_files": False}
    data = ImageFolder(str(root), num_workers=0, **unchecked)
    data.setup("fit")
    with pytest.raises(ValueError, match=r"cat.1\.png cannot be read"):
        list(data.train_dataloader())
    for workers in (0, 2):
        data = ImageFolder(str(root), num_workers=workers, on_error="skip", **unchecked)
        data.setup("fit")
        with pytest.warns(RuntimeWarning, match=r"skipped: .*1\.png") if workers == 0 else pytest.MonkeyPatch.context():
            labels = torch.cat([batch[1] for batch in data.train_dataloader()])
        assert len(labels) == 6
        with pytest.warns(UserWarning, match=r"1 files could not be read and were skipped"):
            data.teardown("fit")


def test_on_error_is_checked() -> None:
    with pytest.raises(ValueError, match="on_error must be raise or skip, got 'ignore'"):
        ImageFolder("photos", on_error="ignore")


def test_values_that_are_no_grey_levels_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.linspace(0, 1, 12, dtype=np.float32).reshape(3, 4)).save(tmp_path / "float.tif")
    Image.fromarray(np.array([[0, 70000]], dtype=np.int32)).save(tmp_path / "deep.tif")
    for name in ("float.tif", "deep.tif"):
        with pytest.raises(UnreadableImage, match=f"{name} cannot be read as an image: its values"):
            read_image(tmp_path / name)


def test_skipping_counts_files_and_not_attempts() -> None:
    class Some(Dataset[int]):
        def __len__(self) -> int:
            return 10

        def __getitem__(self, index: int) -> int:
            if 2 <= index < 9:
                raise UnreadableImage(f"{index} is broken")
            return index

    found = SkipUnreadable(Some())
    with pytest.warns(RuntimeWarning, match="broken"):
        read = [found[index] for _ in range(2) for index in range(10)]
    assert read == [0, 1, *[9] * 8] * 2
    assert found.broken.tolist() == [0, 0, *[1] * 7, 0]


def test_other_errors_are_raised() -> None:
    class Wrong(Dataset[int]):
        def __len__(self) -> int:
            return 1

        def __getitem__(self, index: int) -> int:
            raise ValueError("a mistake in a transform")

    with pytest.raises(ValueError, match="a mistake"):
        SkipUnreadable(Wrong())[0]


def test_any_decoder_error_becomes_unreadable_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "odd.png")

    def fails(self: Image.Image) -> None:
        raise NotImplementedError("pixel format 7")

    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", fails)
    with pytest.raises(UnreadableImage, match=r"odd\.png cannot be read as an image: pixel format 7"):
        read_image(tmp_path / "odd.png")


def test_only_the_listed_formats_are_tried(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "texture.dds")
    (tmp_path / "texture.dds").rename(tmp_path / "texture.jpg")
    with pytest.raises(UnreadableImage, match=r"texture\.jpg cannot be read as an image: cannot identify"):
        read_image(tmp_path / "texture.jpg")


def test_every_format_has_an_ending_and_every_ending_a_format() -> None:
    known = Image.registered_extensions()
    assert {known[ending] for ending in ENDINGS} == set(FORMATS)


@pytest.mark.parametrize("ending", ENDINGS)
def test_files_of_every_ending_are_images(ending: str, tmp_path: Path) -> None:
    """In class folders, beside masks, and in predictions."""
    for part in ("train", "val"):
        for name in ("images", "masks"):
            (tmp_path / name / part).mkdir(parents=True)
        Image.new("L", (8, 8), 100).save(tmp_path / "images" / part / f"a{ending.upper()}")
        Image.new("L", (8, 8), 1).save(tmp_path / "masks" / part / "a.png")
    [(image, _)] = Folders(str(tmp_path), ["ground", "object"]).pairs("train")
    assert image.suffix == ending.upper()
    assert image_files(tmp_path / "images" / "train") == [image]
    made = ImageFolder(str(tmp_path))._images(tmp_path / "images", lambda image: image)  # its classes: train and val
    assert [Path(file).name for file, _ in made.samples] == [image.name] * 2
    assert np.abs(pixels(read_image(image)) - 100).max() <= 1


def photograph(file: Path, orientation: int = 1) -> Path:
    exif = Image.Exif()
    exif[0x0112] = orientation
    noise = np.random.default_rng(0).integers(0, 255, (40, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(file, exif=exif)
    return file


def test_inspect_returns_size_and_orientation_and_finds_truncated_files(tmp_path: Path) -> None:
    for kind in ("jpg", "png", "webp"):
        file = photograph(tmp_path / f"whole.{kind}", 6)
        assert inspect(file) == Header((64, 40), 6)
        assert inspect(file).upright_size == read_image(file).size == (40, 64)
        assert read_image(file, upright=False).size == (64, 40)
        cut = tmp_path / f"cut.{kind}"
        cut.write_bytes(file.read_bytes()[:-200])
        with pytest.raises(UnreadableImage, match=f"cut.{kind} cannot be read"):
            inspect(cut)
    padded = tmp_path / "padded.jpg"  # some cameras leave zeros at the end
    padded.write_bytes(photograph(tmp_path / "a.jpg").read_bytes() + bytes(500))
    assert inspect(padded).size == (64, 40)


def test_for_each_keeps_the_order_with_errors_as_results() -> None:
    def half(value: int) -> int:
        if value == 3:
            raise UnreadableImage("3 is broken")
        return value // 2

    found = for_each(range(6), half, "numbers")
    assert [str(one) for one in found] == ["0", "0", "1", "3 is broken", "2", "2"]
