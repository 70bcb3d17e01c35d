"""The class of a pixel in every kind of mask; and warnings about classes that do not occur."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from involution.cli import main
from involution.tasks.segment import Folders, Segmenter
from involution.tasks.segment.data.values import PixelValues, pixel_values

IDS = np.array([[0, 1, 2], [2, 1, 0]], np.uint8)
COLOURS = np.array([(0, 0, 0), (255, 128, 0), (0, 0, 255)], np.uint8)


def classes_of(image: Image.Image, values: Any, count: int = 3, ignored: Any = 255) -> list[list[int]]:
    found: list[list[int]] = pixel_values(values, count, ignored).apply(image, "mask.png").tolist()
    return found


def palette_image() -> Image.Image:
    image = Image.fromarray(IDS)
    image.putpalette(COLOURS.ravel().tolist())
    assert image.mode == "P"
    return image


@pytest.mark.parametrize("values", [["#000000", "#FF8000", "0000ff"], COLOURS.tolist()])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_colours(mode: str, values: Any) -> None:
    image = palette_image() if mode == "P" else Image.fromarray(COLOURS[IDS]).convert(mode)
    assert classes_of(image, values) == IDS.tolist()


def test_a_palettes_indices() -> None:
    assert classes_of(palette_image(), None) == IDS.tolist()


def test_other_numbers() -> None:
    own = np.array([7, 255, 1000], np.uint16)[IDS]
    assert classes_of(Image.fromarray(own), [7, 255, 1000]) == IDS.tolist()  # 255 is a class then, and not ignored
    assert classes_of(Image.fromarray(own), [7, 255], 2, 1000) == [[0, 1, 255], [255, 1, 0]]


@pytest.mark.parametrize("high", [1, 255])
def test_binary_masks(high: int) -> None:
    binary = np.array([[0, high], [high, 0]], np.uint8)
    assert classes_of(Image.fromarray(binary), "binary", 2) == [[0, 1], [1, 0]]
    assert classes_of(Image.fromarray(binary * (255 // high)).convert("1"), "binary", 2) == [[0, 1], [1, 0]]
    assert classes_of(Image.fromarray(binary * (255 // high)).convert("1"), None, 2) == [[0, 1], [1, 0]]


def test_ignored_values() -> None:
    assert classes_of(Image.fromarray(IDS), None, 3, 1) == [[0, 255, 2], [2, 255, 0]]
    image = Image.fromarray(COLOURS[IDS])
    assert classes_of(image, ["#000000", "#ff8000"], 2, "#0000ff") == [[0, 1, 255], [255, 1, 0]]
    assert pixel_values(None, 2, None) == PixelValues({0: 0, 1: 1})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([0, 1], "values must be one for each of 3 classes, got 2"),
        ([0, 1, 1], "values must be different"),
        ([0, 1, "#000000"], "values must all be numbers or all be colours"),
        ([0, 1, -1], "values must be from 0 to 65535, got -1"),
        (["#000000", "#00", "#111111"], "a colour must be three numbers from 0 to 255 or such as '#ff8000', got '#00'"),
        ([(0, 0, 0), (0, 0, 256), (0, 0, 1)], "a colour must be three numbers from 0 to 255"),
        ("binary", "values may be binary for two classes, got 3 classes"),
        ("grey", "values must be binary, or a list with the value or colour of each class, got 'grey'"),
    ],
)
def test_values_that_do_not_fit(values: Any, message: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        pixel_values(values, 3, 255)
    assert str(caught.value).startswith(message)


def test_other_values_in_a_mask_are_named() -> None:
    with pytest.raises(ValueError, match=r"mask\.png must hold colours among #000000, .* got #ff8000; data\.values"):
        classes_of(Image.fromarray(COLOURS[IDS]), ["#000000", "#0000ff"], 2)
    with pytest.raises(ValueError, match=r"mask\.png must have one channel, of ids, got mode RGB; data\.values gives"):
        classes_of(Image.fromarray(COLOURS[IDS]), None)


def tree(root: Path, values: tuple[int, ...], place: str = "masks/{part}/{name}.png", image: str = "png") -> Path:
    """Four training and two validation images, with a square of each value but the first."""
    for part, count in (("train", 4), ("val", 2)):
        for number in range(count):
            ids = np.full((24, 32), values[0], np.uint8)
            for index, value in enumerate(values[1:]):
                ids[4:12, 2 + 10 * index : 10 + 10 * index] = value
            mask = root / place.format(part=part, name=number)
            photograph = mask.parent / f"{number}.{image}"
            if place.startswith("masks"):
                photograph = root / "images" / part / f"{number}.{image}"
            for file in (mask, photograph):
                file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(ids).save(mask)
            Image.new("RGB", (32, 24), (number, 0, 0)).save(photograph)
    return root


def data(root: Path, **options: Any) -> Folders:
    given = {"classes": ["ground", "object"], "num_workers": 0, "resize": 24, "crop": 24, **options}
    made = Folders(str(root), **given)
    made.setup("fit")
    return made


def test_one_class_left_is_an_error_before_training(tmp_path: Path) -> None:
    root = tree(tmp_path, (0, 255))
    with pytest.raises(ValueError, match=r"two classes at least, got those of ground, and 8% that are .*is binary for"):
        data(root)
    made = data(root, values="binary")
    assert made.val_set[0][1].unique().tolist() == [0, 1]
    assert data(root, values=[255, 0]).val_set[0][1][0, 0] == 1


def test_only_ignored_pixels(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="got those of none, and 100% that are ignored"):
        data(tree(tmp_path, (255,)))


def test_classes_that_never_occur_are_named(tmp_path: Path) -> None:
    root = tree(tmp_path, (0, 1))
    with pytest.warns(UserWarning, match="no pixel in the masks of train is of sky, which cannot be learnt"):
        data(root, classes=["ground", "object", "sky"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data(root)
        data(root, classes=["ground", "object", "sky"], check_files=False)


def test_a_large_ignored_share_is_a_warning(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="83% of the pixels in the masks of train are ignored"):
        data(tree(tmp_path, (255, 0, 1)))


def test_all_masks_are_checked_before_training(tmp_path: Path) -> None:
    root = tree(tmp_path, (0, 1))
    file = root / "masks" / "val" / "1.png"
    Image.fromarray(np.full((24, 32), 3, np.uint8)).save(file)
    with pytest.raises(ValueError, match=r"val.1\.png must hold ids among 0, 1, 255, got 3"):
        data(root)
    Image.fromarray(np.zeros((24, 30), np.uint8)).save(file)
    with pytest.raises(ValueError, match=r"val.1\.png must have the size of its image"):
        data(root)


def turned(root: Path, orientation: int) -> None:
    """Gives the images, not the masks, an EXIF orientation; pixels stay as they are."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    for file in sorted((root / "images").rglob("*.png")):
        Image.open(file).save(file, exif=exif)


def test_masks_of_images_as_they_are_stored(tmp_path: Path) -> None:
    root = tree(tmp_path, (0, 1))
    turned(root, 6)
    with pytest.raises(ValueError, match=r"must have the size of its image, 24x32, got 32x24; data\.orientation says"):
        data(root)
    made = data(root, orientation="stored", photometric=False)
    image, mask = made.val_set[0]
    assert image.shape[1:] == mask.shape == (24, 32)
    assert made.train_set[0][0].shape[1:] == (24, 24)
    with pytest.raises(ValueError, match="orientation must be upright or stored, got 'left'"):
        data(root, orientation="left")


@pytest.mark.parametrize("orientation", ["upright", "stored"])
def test_orientations_without_a_size_that_tells(orientation: str, tmp_path: Path) -> None:
    root = tree(tmp_path, (0, 1))
    turned(root, 3)
    with pytest.warns(UserWarning, match=f"4 images of train have an EXIF .* data.orientation is {orientation}"):
        made = data(root, orientation=orientation, resize=24)
    file = root / "images" / "val" / "0.png"
    marked = np.array(Image.open(file))
    marked[0, 0] = 255
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.fromarray(marked).save(file, exif=exif)
    brightest = divmod(int(made.val_set[0][0].sum(0).argmax()), 32)
    assert brightest == ((23, 31) if orientation == "upright" else (0, 0))


def test_one_class_is_refused_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"classes must be two at least, got \['object'\].*\['background', 'object'\]"):
        data(tree(tmp_path, (0, 1)), classes=["object"])
    with pytest.raises(ValueError, match=r"num_classes must be at least 2, .* got 1"):
        Segmenter("semantic_fpn", 1, "rednet26")


@pytest.mark.parametrize(
    ("place", "image", "options"),
    [
        ("masks/{part}/{name}.tif", "tif", {}),
        ("masks/{part}/{name}.bmp", "jpg", {}),
        ("{part}/{name}_mask.png", "png", {"images": "{split}", "masks": "{split}", "mask_suffix": "_mask"}),
        ("{part}/{name}.png", "jpg", {"images": "{split}", "masks": "{split}"}),
        ("{part}/masks/{name}.png", "jpg", {"images": "{split}/masks", "masks": "{split}/masks"}),
    ],
)
def test_masks_in_other_places(place: str, image: str, options: dict[str, Any], tmp_path: Path) -> None:
    made = data(tree(tmp_path, (0, 1), place, image), **options)
    assert (len(made.train_set), len(made.val_set)) == (4, 2)  # type: ignore[arg-type]


def test_masks_in_a_folder_below_the_images(tmp_path: Path) -> None:
    root = tree(tmp_path, (0, 1))
    for part in ("train", "val"):
        (root / "masks" / part).rename(root / "images" / part / "masks")
    made = data(root, masks="images/{split}/masks")
    assert (len(made.train_set), len(made.val_set)) == (4, 2)  # type: ignore[arg-type]


def test_hidden_files_are_skipped(tmp_path: Path) -> None:
    root = tree(tmp_path, (0, 1))
    (root / "images" / "train" / "._0.png").write_bytes(b"x")
    (root / "masks" / "train" / ".ipynb_checkpoints").mkdir()
    (root / "masks" / "train" / ".ipynb_checkpoints" / "0.png").write_bytes(b"x")
    assert len(data(root).train_set) == 4  # type: ignore[arg-type]


def test_options_on_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Colours, a square crop and a square window."""
    monkeypatch.chdir(tmp_path)
    root = tree(tmp_path, (0, 1))
    for file in (root / "masks").rglob("*.png"):
        Image.fromarray(COLOURS[np.asarray(Image.open(file))]).save(file)
    options = ["--data.root", str(root), "--data.values", '["#000000", "#ff8000"]', "--data.crop", "32"]
    options += ["--data.num_workers", "0", "--data.batch_size", "2", "--model.backbone", "rednet26"]
    options += ["--trainer.limit_train_batches", "1", "--trainer.limit_val_batches", "0", "--trainer.max_epochs", "1"]
    quiet = ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]
    assert main(["fit", "-c", "masks_rednet50", *options, "--model.window", "16", *quiet]) == 0
    checkpoint = "runs/masks_rednet50/version_0/checkpoints/last.ckpt"
    assert torch.load(checkpoint)["involution"]["palette"] == [(0, 0, 0), (255, 128, 0)]
    model = Segmenter.load_from_checkpoint(checkpoint, map_location="cpu")
    assert model.inference.window == (16, 16)
    model.configure_inference(window=20, window_stride=10)
    assert (model.inference.window, model.inference.stride) == ((20, 20), (10, 10))
