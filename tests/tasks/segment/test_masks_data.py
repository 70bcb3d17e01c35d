"""The data modules: what they read, and their errors."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from processes import sent_to_workers
from torchvision import tv_tensors

from involution.engine.images import UnreadableImage
from involution.tasks.segment import VOC, CamVid, Cityscapes, Folders, Pets
from involution.tasks.segment.data.base import SegmentationData
from involution.tasks.segment.module import SizedReader
from involution.tasks.segment.preprocessing import Preprocessing, RandomCrop

Tree = Callable[[str], Path]
NAMES = ["ground", "red", "green"]


def data(kind: str, root: Path, **options: Any) -> SegmentationData:
    options = {"num_workers": 0, "batch_size": 2, "resize": 32, "crop": (32, 40), **options}
    if kind == "masks":
        return Folders(str(root), **{"classes": NAMES, **options})
    makers: dict[str, Any] = {"camvid": CamVid, "cityscapes": Cityscapes, "voc": VOC, "pets": Pets}
    return makers[kind](str(root), **options)


# What a tree's masks have as classes, and how many pairs are in train, val and test.
EXPECTED = {
    "masks": ({0, 1, 2, 255}, (4, 3, 3)),
    "camvid": ({0, 4, 8}, (2, 2, 2)),
    "cityscapes": ({0, 13, 255}, (2, 2, 2)),
    "voc": ({0, 1, 2, 255}, (2, 2, 2)),
    "pets": ({0, 1, 2}, (3, 1, 2)),
}


@pytest.mark.parametrize("kind", EXPECTED)
def test_every_format(kind: str, tree: Tree) -> None:
    module = data(kind, tree(kind))
    classes, counts = EXPECTED[kind]
    module.setup("fit")
    module.setup("test")
    sets: list[Any] = [module.train_set, module.val_set, module.test_set]
    assert tuple(map(len, sets)) == counts
    assert {int(value) for one in (module.val_set, module.test_set) for _, mask in one for value in mask.unique()} == (
        classes
    )
    assert len(module.palette) == module.num_classes == len(set(module.palette))
    image, mask = sets[1][0]
    height, width = mask.shape  # as large as the file; the image has the size of evaluation
    assert (image.dtype, mask.dtype) == (torch.float32, torch.uint8)
    assert image.shape == (3, 32 * height // min(mask.shape), 32 * width // min(mask.shape))
    for images, masks in module.train_dataloader():
        assert all(one.shape == (3, 32, 40) for one in images)
        assert all(one.shape == (32, 40) for one in masks)
        assert {int(value) for one in masks for value in one.unique()} <= classes | {255}


def test_published_palettes_and_classes(tree: Tree) -> None:
    assert data("cityscapes", tree("cityscapes")).palette[:2] == [(128, 64, 128), (244, 35, 232)]
    assert Cityscapes.classes[13] == "car"
    assert len(Cityscapes.classes) == 19
    palette = data("voc", tree("voc")).palette
    assert palette[:5] == [(0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0), (0, 0, 128)]
    assert palette[15] == (192, 128, 128)  # a person
    assert data("voc", tree("cityscapes")).classes[15] == "person"


def test_camvid_is_its_readme(data_folder: Path) -> None:
    import json

    root = data_folder / "camvid"
    if not root.is_dir():
        pytest.skip(f"no {root}")
    module = CamVid(str(root))
    module.setup("fit")
    module.setup("test")
    assert [len(one) for one in (module.train_set, module.val_set, module.test_set)] == [367, 101, 233]  # type: ignore[arg-type]
    published = json.loads((root / "classes.json").read_text())
    assert module.classes == published["classes"][:11]
    assert module.palette == [tuple(one) for one in published["palette"][:11]]
    image, mask = module.test_set[0]
    assert (image.shape, mask.shape) == ((3, 360, 480), (360, 480))
    assert set(mask.unique().tolist()) <= {*range(11), 255}


def test_masks_follow_their_images(tree: Tree) -> None:
    """Scaled, cut and mirrored together: a pixel's class is that of its colour."""
    module = data("masks", tree("masks"), photometric=False, crop=(48, 48))
    module.setup("fit")
    mean, std = (torch.tensor(one)[:, None, None] for one in module.preprocessing[1:])
    seen = set()
    for _ in range(5):
        for images, masks in module.train_dataloader():
            for image, mask in zip(images, masks, strict=True):
                colours = image * std + mean
                for index, channel in ((1, 0), (2, 1)):
                    inside = mask == index
                    if inside.sum() > 50:
                        seen.add(index)
                        others = colours[[one for one in range(3) if one != channel]].amax(0)
                        assert (colours[channel][inside] > others[inside]).float().mean() > 0.8
                padded = mask == 255
                assert (image[:, padded].abs() < 0.02).float().mean() > 0.3 or padded.sum() < 60
    assert seen == {1, 2}


def test_other_names_and_ids(tmp_path: Path) -> None:
    """Patterns, suffixes, nested folders, another ignored id."""
    for part in ("training", "rest"):
        for name in ("a", "b/c"):
            image, mask = tmp_path / part / "rgb" / f"{name}.jpg", tmp_path / part / "gt" / f"{name}_gt.png"
            for file in (image, mask):
                file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 6)).save(image)
            Image.fromarray(np.array([[0, 1, 7, 1]] * 6, np.uint8).repeat(2, 1)).save(mask)
    (tmp_path / "rest" / "gt" / "notes.txt").write_text("left out")
    where: dict[str, Any] = {"images": "{split}/rgb", "masks": "{split}/gt", "mask_suffix": "_gt"}
    names = {"train": "training", "val": "rest"}
    module = Folders(str(tmp_path), ["x", "y"], ignore_index=7, palette=[(1, 2, 3), (4, 5, 6)], **where, **names)
    module.setup("fit")
    assert len(module.train_set) == len(module.val_set) == 2  # type: ignore[arg-type]
    assert module.val_set[0][1][0].tolist() == [0, 0, 1, 1, 255, 255, 1, 1]
    assert module.palette == [(1, 2, 3), (4, 5, 6)]


def test_names_of_two_files(tree: Tree) -> None:
    root = tree("masks")
    Image.open(root / "images" / "val" / "1.png").save(root / "images" / "val" / "1.JPG")
    with pytest.raises(ValueError, match=r"every name must belong to one file, got .*1\.(png|JPG) beside .*1\."):
        data("masks", root).setup("validate")


def test_training_batches_are_complete(tree: Tree) -> None:
    module = data("masks", tree("masks"), batch_size=3)
    module.setup("fit")
    assert [len(images) for images, _ in module.train_dataloader()] == [3]  # of four
    assert [len(images) for images, _ in module.val_dataloader()] == [3]
    module.batch_size = 5
    with pytest.raises(ValueError, match="batch_size must be at most 4, a process's images, got 5"):
        module.train_dataloader()


def test_loader_workers_receive_no_module(tree: Tree) -> None:
    """Python 3.14 pickles what they get; neither the data module, nor the trainer and its network, are part of it."""
    module = data("masks", tree("masks"))
    module.setup("fit")
    reader = SizedReader(module.preprocessing.evaluation())
    for loader in (module.train_dataloader(), module.val_dataloader()):
        content = sent_to_workers(loader, reader)
        assert b"TrainingPairs" in content or b"EvaluationPairs" in content
        assert b"lightning" not in content
        assert b"torch.nn" not in content


def damage(root: Path, kind: str) -> tuple[Path, str]:
    """Damages a tree of `masks`; returns the file that the error must name, and its message."""
    mask, image = root / "masks" / "val" / "1.png", root / "images" / "val" / "1.png"
    ids = np.zeros((48, 64), np.uint8)
    if kind == "missing mask":
        mask.unlink()
        return image, "must have its mask in"
    if kind == "missing image":
        image.unlink()
        return mask, "must have its image in"
    if kind == "other size":
        Image.fromarray(ids[:, 1:]).save(mask)
        return mask, "must have the size of its image, 64x48, got 63x48; data.orientation says"
    if kind == "unknown id":
        ids[3, 5], ids[4, 5] = 3, 254
        Image.fromarray(ids).save(mask)
        return mask, "must hold ids among 0, 1, 2, 255, got 3, 254"
    if kind == "16 bits":
        Image.fromarray(ids.astype(np.uint16) + 300).save(mask)
        return mask, "must hold ids among 0, 1, 2, 255, got 300"
    if kind == "colours":
        Image.fromarray(ids).convert("RGB").save(mask)
        return mask, "must have one channel, of ids, got mode RGB"
    if kind == "broken mask":
        mask.write_bytes(mask.read_bytes()[:60])
        return mask, "cannot be read as a mask"
    assert kind == "broken image"
    image.write_bytes(b"no image")
    return image, "cannot be read as an image"


@pytest.mark.parametrize(
    "kind",
    ["missing mask", "missing image", "other size", "unknown id", "16 bits", "colours", "broken mask", "broken image"],
)
def test_errors_name_the_file(kind: str, tree: Tree) -> None:
    root = tree("masks")
    file, message = damage(root, kind)

    def read() -> None:
        module = data("masks", root)
        module.setup("validate")
        list(module.val_dataloader())

    with pytest.raises((ValueError, FileNotFoundError, UnreadableImage)) as caught:
        read()
    assert str(caught.value).startswith(f"{file} ")
    assert message in str(caught.value)


@pytest.mark.parametrize("kind", EXPECTED)
def test_an_empty_root(kind: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"root must hold .*, got {tmp_path}"):
        data(kind, tmp_path).setup("fit")


def test_a_mask_without_an_image(tree: Tree) -> None:
    root = tree("cityscapes")
    sorted((root / "leftImg8bit" / "val").rglob("*.png"))[0].unlink()
    with pytest.raises(FileNotFoundError, match=r"every mask must have an image, got .*000000_000019_gtFine"):
        data("cityscapes", root).setup("validate")


def test_photometric_changes_keep_red_red(tree: Tree) -> None:
    """Brightness, contrast, saturation and a small hue rotation; channels are not permuted."""
    module = data("masks", tree("masks"), crop=(48, 48))
    mean, std = (torch.tensor(one)[:, None, None] for one in module.preprocessing[1:])
    red = torch.zeros(3, 96, 96, dtype=torch.uint8)  # at half of its size still as large as the crop: no padding
    red[0] = 200
    seen = []
    for _ in range(40):
        image, _mask = module._training(tv_tensors.Image(red), tv_tensors.Mask(torch.zeros(96, 96).byte()))
        colours = (image * std + mean)[:, 20:28, 20:28].mean((1, 2))
        assert colours.argmax() == 0
        seen.append(colours)
    assert torch.stack(seen).std(0)[0] > 0.02


def test_padding_is_the_mean_whatever_the_photometric_changes() -> None:
    """Padded last, as published: exactly 0 after normalisation, and ignored in the mask; every other pixel is known."""
    torch.manual_seed(0)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    transform = Preprocessing(20, mean, std).training((0.5, 1.0), (32, 40), 1.0, 0.5, photometric=True)
    for _ in range(20):
        white = torch.full((3, 24, 24), 255, dtype=torch.uint8)
        image, mask = transform(tv_tensors.Image(white), tv_tensors.Mask(torch.zeros(24, 24, dtype=torch.uint8)))
        assert (image.shape, mask.shape) == ((3, 32, 40), (32, 40))
        padded = mask == 255
        assert 100 <= (~padded).sum() <= 400
        assert not image[:, padded].any()
        assert image[:, ~padded].abs().amin() > 0.1


def known_share(mask: torch.Tensor) -> float:
    counts = mask[mask != 255].long().bincount()
    return float(counts.max() / counts.sum())


def test_crops_are_resampled_where_one_class_takes_too_much() -> None:
    torch.manual_seed(0)
    mask = torch.zeros(64, 64, dtype=torch.uint8)
    mask[:, 48:] = 1  # a quarter of a crop or more from column 24 on: nine of the 33 places
    image = tv_tensors.Image(torch.zeros(3, 64, 64, dtype=torch.uint8))
    within = []
    for limit in (1.0, 0.75):
        crop = RandomCrop((32, 32), limit)
        shares = [known_share(crop(image, tv_tensors.Mask(mask))[1]) for _ in range(60)]
        within.append(sum(share <= 0.75 for share in shares))
    assert within[0] < 30
    assert within[1] > 50  # one in 24 has none after ten


def test_the_share_is_that_of_the_crop() -> None:
    """Also where the image is smaller than the crop along an axis, and pixels are ignored."""
    torch.manual_seed(0)
    crop = RandomCrop((24, 20), 0.75)
    for size in ((40, 30), (16, 30), (40, 12), (9, 7)):
        mask = tv_tensors.Mask(torch.randint(0, 4, size, dtype=torch.uint8))
        mask[:, ::3] = 255
        for _ in range(5):
            params = crop.make_params([mask])
            assert crop._largest_share(mask, params) == known_share(crop.transform(mask, params))


def test_a_listed_file_that_is_missing(tree: Tree) -> None:
    root = tree("cityscapes")
    [mask, _] = sorted((root / "gtFine" / "val").rglob("*.png"))
    mask.unlink()
    with pytest.raises(FileNotFoundError, match=f"every image must have a mask, got .* without {mask}"):
        data("cityscapes", root).setup("validate")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resize": 0}, "resize and crop must be at least 1, got 0 and (32, 40)"),
        ({"crop": (0, 4)}, "resize and crop must be at least 1"),
        ({"max_share": 0}, "max_share must be in 0..1 and not 0, got 0"),
        ({"scale": (2.0, 0.5)}, "scale must be a range of positive factors, got (2.0, 0.5)"),
        ({"scale": (0.0, 0.5)}, "scale must be a range"),
        ({"flip": 1.5}, "flip must be a probability, got 1.5"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"classes": ["a", "b", "a"]}, "classes must be 2 to 255 different names, got ['a', 'b', 'a']"),
        ({"ignore_index": -1}, "ignore_index must be an id, from 0 to 65535, got -1"),
        ({"palette": [(0, 0, 0), (0, 0, 256), (1, 2, 3)]}, "palette must be of colours, three numbers from 0 to 255"),
        ({"palette": [(0, 0, 0)]}, "palette must have a colour for each of 3 classes, got 1"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        data("masks", tmp_path, **options)
    assert message in str(caught.value)
