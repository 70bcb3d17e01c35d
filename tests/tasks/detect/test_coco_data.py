"""Data in COCO's format: the content of batches, scales and groups, and errors."""

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from processes import sent_to_workers

from involution.engine.images import UnreadableImage
from involution.engine.module import Reader
from involution.tasks.detect import COCO
from involution.tasks.detect.annotations import AnnotationError
from involution.tasks.detect.data.sampling import GroupedSampler


def data(root: Path, **options: Any) -> COCO:
    given = {"num_workers": 0, "min_size": 48, "max_size": 64, "flip": 0.0, **options}
    made = COCO(str(root), **given)
    made.setup("fit")
    return made


def test_a_sample_is_as_annotated(coco_folder: Path) -> None:
    made = data(coco_folder, masks=True)
    assert made.classes == ["cat", "dog"]
    assert made.num_classes == 2
    image, target = made.train_set[1]  # 48x64, as it is
    assert (image.shape, image.dtype) == ((3, 64, 48), torch.float32)
    assert type(image) is torch.Tensor
    assert image.max() <= 1
    assert target["boxes"].tolist() == [[2, 4, 20, 22], [24, 4, 44, 24]]
    assert target["labels"].tolist() == [1, 2]
    assert (target["masks"].shape, target["masks"].dtype) == ((2, 64, 48), torch.uint8)
    for mask, (left, top, right, bottom) in zip(target["masks"], target["boxes"].int().tolist(), strict=True):
        assert mask.sum() == (right - left) * (bottom - top) == mask[top:bottom, left:right].sum()
    assert "masks" not in data(coco_folder).train_set[1][1]


def test_boxes_and_masks_follow_the_pixels_through_every_transform(coco_folder: Path) -> None:
    """The red rectangle matches the cat's box and mask after flips, scales and jitter."""
    seen = set()
    for options in ({"flip": 1.0}, {"flip": 0.5, "train_min_sizes": [32, 40, 48]}, {"jitter": (0.4, 2.0)}):
        made = data(coco_folder, masks=True, **options)
        for seed in range(12):
            torch.manual_seed(seed)
            image, target = made.train_set[seed % 4]
            seen.add(tuple(image.shape[1:]))
            red = (image[0] > 0.7) & (image[1] < 0.4)
            cats = [i for i, label in enumerate(target["labels"].tolist()) if label == 1]
            assert len(cats) == (1 if red.sum() > 30 else len(cats))
            for cat in cats:
                left, top, right, bottom = target["boxes"][cat].tolist()
                for shape in (red, target["masks"][cat] > 0):
                    rows, columns = torch.where(shape)
                    if len(rows) >= 80:  # smaller ones consist mostly of interpolated edges
                        assert abs(columns.min() - left) <= 1.5
                        assert abs(columns.max() + 1 - right) <= 1.5
                        assert abs(rows.min() - top) <= 1.5
                        assert abs(rows.max() + 1 - bottom) <= 1.5
    assert (64, 64) in seen  # the square of the jitter
    assert len(seen) > 5


def test_jitter_pads_at_the_right_and_at_the_bottom_with_the_mean(coco_folder: Path) -> None:
    """As published; torchvision's RandomCrop would move the image around in the square."""
    made = data(coco_folder, masks=True, jitter=(0.5, 0.5))
    for seed in range(4):
        torch.manual_seed(seed)
        image, target = made.train_set[1]  # 48x64, two squares at (2, 4) and (24, 4)
        assert image.shape == (3, 64, 64)
        assert target["boxes"].tolist() == [[1, 2, 10, 11], [12, 2, 22, 12]]
        assert target["masks"].shape == (2, 64, 64)
        assert not target["masks"][:, 32:].any()
        assert not target["masks"][:, :, 24:].any()
        mean = (255 * torch.tensor(made.preprocessing.mean)).round() / 255
        for padding in (image[:, 32:], image[:, :, 24:]):
            torch.testing.assert_close(padding, mean[:, None, None].expand_as(padding))
        assert image[:, :32, :24].std() > 0.1


def test_jitter_crops_at_random_places(coco_folder: Path) -> None:
    made = data(coco_folder, jitter=(2.0, 2.0))
    seen = set()
    for seed in range(30):
        torch.manual_seed(seed)
        image, target = made.train_set[0]
        assert image.shape == (3, 64, 64)
        seen |= {tuple(box) for box in target["boxes"].tolist()}
        assert target["boxes"].numel() == 0 or 0 <= target["boxes"].min() <= target["boxes"].max() <= 64
    assert len(seen) > 3


def test_longer_sides_are_bounded(coco_folder: Path) -> None:
    image, _ = data(coco_folder, min_size=60, max_size=60).train_set[0]  # 64x48 -> 60x45
    assert image.shape == (3, 45, 60)


def test_crowds_and_empty_images_are_only_evaluated(coco_folder: Path) -> None:
    made = data(coco_folder, masks=True)
    assert len(made.train_set) == 6
    assert len(made.val_set) == 7
    assert len(made.train_set[5][1]["labels"]) == 2  # and a crowd
    kept = data(coco_folder, empty_images=True, masks=True)
    assert len(kept.train_set) == 7
    target = kept.train_set[6][1]
    assert target["boxes"].shape == (0, 4)
    assert target["masks"].shape[0] == 0
    assert kept.val_set[6][1] == {"image_id": 106}
    assert kept.val_set[0][0].shape == (3, 48, 64)


def test_a_subset_of_categories(coco_folder: Path) -> None:
    made = data(coco_folder, categories=["dog"])
    assert made.classes == ["dog"]
    assert len(made.train_set) == 3
    assert [made.train_set[i][1]["labels"].tolist() for i in range(3)] == [[1]] * 3


def test_batches_are_of_one_shape(coco_folder: Path) -> None:
    made = data(coco_folder, batch_size=2, empty_images=True)
    loader = made.train_dataloader()
    shapes = [[image.shape[2] >= image.shape[1] for image in images] for images, _ in loader]
    assert sorted(map(len, shapes)) == [1, 2, 2, 2]
    assert all(len(set(batch)) == 1 for batch in shapes[:2])


def test_loader_workers_receive_no_module(coco_folder: Path) -> None:
    """Python 3.14 pickles what they get; neither the data module, nor the trainer and its network, are part of it."""
    made = data(coco_folder, masks=True)
    reader = Reader(made.preprocessing.evaluation())
    for loader in (made.train_dataloader(), made.val_dataloader()):
        content = sent_to_workers(loader, reader)
        assert b"EvaluationImages" in content or b"TrainingImages" in content
        assert b"lightning" not in content
        assert b"torch.nn" not in content


@pytest.mark.parametrize(("size", "batches"), [(48, [5, 1]), (32, [5])])
def test_a_last_image_whose_features_could_be_a_pixel_is_dropped(
    size: int, batches: list[int], coco_folder: Path
) -> None:
    """The backbone's stride is 32: at that size a batch norm could have one value per channel."""
    made = data(coco_folder, min_size=size, batch_size=5, group_by_shape=False)
    assert [len(images) for images, _ in made.train_dataloader()] == batches


@pytest.mark.parametrize(("count", "replicas", "size"), [(53, 1, 4), (53, 2, 4), (8, 3, 2), (3, 1, 8)])
def test_grouping_keeps_every_image_and_resumes(count: int, replicas: int, size: int) -> None:
    random = np.random.default_rng(0)
    wide = random.random(count) < 0.6
    dataset: Any = range(count)

    def sampler(rank: int) -> GroupedSampler:
        return GroupedSampler(list(wide), size, dataset=dataset, seed=3, replicas=replicas, rank=rank)

    everything: Counter[int] = Counter()
    for rank in range(replicas):
        order = [index for _, index in sampler(rank)]
        assert len(order) == -(-count // replicas)
        everything.update(order)
        batches = [order[start : start + size] for start in range(0, len(order), size)]
        mixed = [len({bool(wide[index]) for index in batch}) > 1 for batch in batches]
        assert sum(mixed) <= 1 + (size > 2)  # what is left over
        later = sampler(rank)
        later.resume(0, size)
        assert [index for _, index in later] == order[size:]
        later.set_epoch(1)
        if len(order) > 4:
            assert [index for _, index in later] != order
    assert set(everything) == set(range(count))
    assert sum(everything.values()) - count < replicas


def test_cocos_own_images_load(data_folder: Path) -> None:
    root = data_folder / "coco482"
    if not root.is_dir():
        pytest.skip(f"no {root}")
    made = COCO(str(root), masks=True, min_size=100, max_size=160, num_workers=0, batch_size=8)
    made.setup("fit")
    assert made.num_classes == 80
    assert len(made.val_set) == 188
    for index in range(0, len(made.train_set), 20):
        image, target = made.train_set[index]
        assert min(image.shape[1:]) <= 100
        assert len(target["masks"]) == len(target["boxes"]) == len(target["labels"])
        assert target["masks"].shape[1:] == image.shape[1:]
        # A mask fills part of its box, and reaches no further than a pixel out of it.
        for mask, (left, top, right, bottom) in zip(target["masks"], target["boxes"].tolist(), strict=True):
            rows, columns = torch.where(mask > 0)
            if len(rows):
                assert columns.min() >= left - 2
                assert columns.max() <= right + 2
                assert rows.min() >= top - 2
                assert rows.max() <= bottom + 2


def broken(coco_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(coco_folder, tmp_path / "broken"))


def test_an_image_of_another_size_is_named(coco_folder: Path, tmp_path: Path) -> None:
    root = broken(coco_folder, tmp_path)
    Image.new("RGB", (10, 12)).save(root / "train2017" / "0.png")
    with pytest.raises(AnnotationError, match=r"image 100 must be 64x48, .*0.png, which is 10x12"):
        data(root).train_set[0]


def test_a_missing_mask_is_named(coco_folder: Path, tmp_path: Path) -> None:
    root = broken(coco_folder, tmp_path)
    file = root / "annotations" / "instances_train2017.json"
    content = json.loads(file.read_text())
    content["annotations"][2].pop("segmentation")
    file.write_text(json.dumps(content))
    data(root)
    with pytest.raises(AnnotationError, match=r"annotations\[2\] \(id 3\): segmentation must be there"):
        data(root, masks=True)


def test_validation_must_have_the_same_categories(coco_folder: Path, tmp_path: Path) -> None:
    root = broken(coco_folder, tmp_path)
    file = root / "annotations" / "instances_val2017.json"
    file.write_text(file.read_text().replace('"dog"', '"cow"'))
    with pytest.raises(ValueError, match="categories of train must be those of val"):
        data(root)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_size": 0}, "must be at least 1, got 0"),
        ({"train_min_sizes": []}, "must be at least 1"),
        ({"min_size": 80}, "max_size must be at least the shorter sides' 80, got 64"),
        ({"jitter": (0.0, 1.0)}, r"jitter must be a range of positive scales, got \(0.0, 1.0\)"),
        ({"jitter": (2.0, 1.0)}, "jitter must be a range"),
        ({"flip": 1.5}, "flip must be a probability, got 1.5"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"categories": ["bird"]}, r"categories must be some of cat, dog, got \['bird'\]"),
    ],
)
def test_bad_arguments(coco_folder: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        data(coco_folder, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train": "nothing"}, "root must hold the images of train, got .*: no folder .*nothing"),
        ({"annotations": "{split}.json"}, "root must hold the annotations of val, got .*val2017.json"),
    ],
)
def test_missing_files(coco_folder: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(FileNotFoundError, match=message):
        data(coco_folder, **options)


def change(root: Path, part: str, edit: Callable[[dict[str, Any]], None]) -> None:
    """Rewrites a part's annotation file."""
    file = root / "annotations" / f"instances_{part}.json"
    content = json.loads(file.read_text())
    edit(content)
    file.write_text(json.dumps(content))


def test_labels_are_the_same_whatever_the_order_of_categories(coco_folder: Path, tmp_path: Path) -> None:
    """Labels follow the ids; the two files list the same categories in different orders."""
    root = broken(coco_folder, tmp_path)
    change(root, "val2017", lambda content: content["categories"].reverse())
    made = data(root)
    assert made.classes == ["cat", "dog"]
    assert made.train_set[1][1]["labels"].tolist() == [1, 2]
    assert list(made.split("val").annotations.categories) == list(made.split("train").annotations.categories) == [3, 7]


def test_category_ids_and_names_must_agree_between_parts(coco_folder: Path, tmp_path: Path) -> None:
    root = broken(coco_folder, tmp_path)

    def exchange(content: dict[str, Any]) -> None:
        first, second = content["categories"]
        first["name"], second["name"] = second["name"], first["name"]

    change(root, "val2017", exchange)
    with pytest.raises(ValueError, match="the categories of train must be those of val"):
        data(root)


def test_only_training_skips_and_clips(coco_folder: Path, tmp_path: Path) -> None:
    root = broken(coco_folder, tmp_path)

    def damage(content: dict[str, Any]) -> None:
        content["annotations"][0]["bbox"] = [-3, 4, 25, 18]
        content["annotations"][1]["bbox"][2] = 0

    for part in ("train2017", "val2017"):
        change(root, part, damage)
    with pytest.warns(RuntimeWarning, match="clipped 1 boxes|left out 1 objects|evaluated 2 objects as they are"):
        made = data(root, on_error="skip")
    assert made.train_set[0][1]["boxes"].tolist() == [[0, 4, 22, 22]]
    assert len(made.train_set[1][1]["boxes"]) == 1
    truth = made.split("val").annotations.objects
    assert truth[100][0].box == (-3, 4, 25, 18)
    assert len(truth[101]) == 2


def turn(root: Path, part: str, number: int, orientation: int, upright: bool) -> None:
    """Gives an image an EXIF orientation; the annotation file has the size of either convention."""
    file = root / part / f"{number}.png"
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.open(file).save(file, exif=exif)
    width, height = Image.open(file).size
    size = (height, width) if upright and orientation >= 5 else (width, height)
    change(root, part, lambda content: content["images"][number].update(width=size[0], height=size[1]))


@pytest.mark.parametrize("upright", [True, False])
def test_sizes_tell_whether_boxes_are_in_upright_pixels(upright: bool, coco_folder: Path, tmp_path: Path) -> None:
    """Images whose size does not tell follow the others."""
    root = broken(coco_folder, tmp_path)
    before = data(coco_folder).train_set[2][0]
    turn(root, "train2017", 0, 6, upright)
    turn(root, "train2017", 2, 3, upright)
    made = data(root)
    assert made.train_set[0][0].shape == ((3, 64, 48) if upright else (3, 48, 64))
    assert torch.equal(made.train_set[2][0], before.flip(1, 2) if upright else before)
    said = "upright" if upright else "stored"
    data(root, orientation=said)
    with pytest.raises(AnnotationError, match=f"orientation must be that of .* sizes, got .*{said} images in .*0.png"):
        data(root, orientation="stored" if upright else "upright")


def test_orientations_that_contradict_each_other(coco_folder: Path, tmp_path: Path) -> None:
    root = broken(coco_folder, tmp_path)
    turn(root, "val2017", 0, 6, True)
    turn(root, "val2017", 2, 8, False)
    with pytest.raises(AnnotationError, match=r"upright images in .*0\.png and stored images in .*2\.png"):
        data(root)


def test_orientations_without_a_size_that_tells(coco_folder: Path, tmp_path: Path) -> None:
    root = broken(coco_folder, tmp_path)
    before = data(coco_folder).train_set[2][0]
    turn(root, "train2017", 2, 3, True)
    with pytest.warns(UserWarning, match=r"1 images in .* have an EXIF orientation, 2\.png the first, and no size"):
        made = data(root)
    assert torch.equal(made.train_set[2][0], before.flip(1, 2))
    assert torch.equal(data(root, orientation="stored").train_set[2][0], before)
    for said, pixels in (("stored", before), ("upright", before.flip(1, 2)), ("auto", before.flip(1, 2))):
        assert torch.equal(data(root, orientation=said, check_files=False).train_set[2][0], pixels)


def test_broken_images_are_found_before_training(coco_folder: Path, tmp_path: Path) -> None:
    root = broken(coco_folder, tmp_path)
    file = root / "train2017" / "3.png"
    file.write_bytes(file.read_bytes()[:700])
    with pytest.raises(UnreadableImage, match=r"train2017.3\.png cannot be read"):
        data(root)
    with pytest.warns(UserWarning, match=r"left out 1 images, the first: .*3\.png cannot be read"):
        made = data(root, on_error="skip")
    assert len(made.train_set) == 5
    assert len(data(root, on_error="skip", check_files=False).train_set) == 6
    file.replace(root / "val2017" / "3.png")
    shutil.copy(coco_folder / "train2017" / "3.png", file)
    with pytest.raises(ValueError, match=r"val2017.3\.png cannot be read .*none out of evaluation"):
        data(root, on_error="skip")


def test_an_image_that_breaks_later_is_skipped(coco_folder: Path, tmp_path: Path) -> None:
    root = broken(coco_folder, tmp_path)
    made = data(root, on_error="skip", group_by_shape=True)
    (root / "train2017" / "0.png").write_bytes(b"")
    with pytest.warns(RuntimeWarning, match=r"skipped: .*0\.png cannot be read"):
        assert sum(len(images) for images, _ in made.train_dataloader()) == 6


def test_validation_is_held_out_of_training(coco_folder: Path) -> None:
    """For exports with one part: every image is in exactly one of the two, always the same."""
    made = data(coco_folder, val=None, val_fraction=0.3)
    parts = [{image.id for image in made.split(part).annotations.images} for part in ("train", "val", "test")]
    assert parts[1] == parts[2]
    assert (len(parts[0]), len(parts[1])) == (5, 2)
    assert parts[0] | parts[1] == set(range(100, 107))
    again = data(coco_folder, val=None, val_fraction=0.3, on_error="skip")
    assert {image.id for image in again.split("val").annotations.images} == parts[1]


def test_classes_without_objects_are_named(coco_folder: Path, tmp_path: Path) -> None:
    root = broken(coco_folder, tmp_path)
    for part in ("train2017", "val2017"):
        change(root, part, lambda content: content["categories"].append({"id": 0, "name": "animals"}))
    with pytest.warns(UserWarning, match=r"no object to train on is of animals; data\.categories names"):
        made = data(root)
    assert made.classes == ["animals", "cat", "dog"]
    assert data(root, categories=["dog", "cat"]).classes == ["dog", "cat"]


def test_errors_of_another_layout_name_the_options(coco_folder: Path, tmp_path: Path) -> None:
    root = broken(coco_folder, tmp_path)
    (root / "annotations" / "instances_train2017.json").rename(root / "train2017" / "_annotations.coco.json")
    with pytest.raises(FileNotFoundError, match=r"data\.annotations is the file's pattern.*_annotations\.coco\.json"):
        data(root)


def roboflow(root: Path) -> dict[str, Any]:
    """Ids from 0, a category for the project, annotations beside the images."""
    for part, name in (("train2017", "train"), ("val2017", "valid")):

        def export(content: dict[str, Any]) -> None:
            content["categories"].insert(0, {"id": 0, "name": "cat", "supercategory": "none"})
            for number, one in enumerate(content["annotations"]):
                one["id"] = number

        change(root, part, export)
        (root / part).rename(root / name)
        (root / "annotations" / f"instances_{part}.json").rename(root / name / "_annotations.coco.json")
    return {"train": "train", "val": "valid", "annotations": "{split}/_annotations.coco.json"}


def cvat(root: Path) -> dict[str, Any]:
    """One part, whose images are in a folder of its name."""
    (root / "images").mkdir()
    (root / "train2017").rename(root / "images" / "default")
    (root / "annotations" / "instances_train2017.json").rename(root / "annotations" / "instances_default.json")
    return {"train": "default", "val": None, "images": "images/{split}"}


def label_studio(root: Path) -> dict[str, Any]:
    """One file beside the image folder; file names begin with the folder and have backslashes, as on Windows."""

    def export(content: dict[str, Any]) -> None:
        for one in content["images"]:
            one["file_name"] = f"images\\{one['file_name']}"

    change(root, "train2017", export)
    (root / "train2017").rename(root / "images")
    (root / "annotations" / "instances_train2017.json").rename(root / "result.json")
    return {"train": "result", "val": None, "images": ".", "annotations": "{split}.json"}


@pytest.mark.parametrize("export", [roboflow, cvat, label_studio])
def test_exports_of_labelling_tools(
    export: Callable[[Path], dict[str, Any]], coco_folder: Path, tmp_path: Path
) -> None:
    """As docs/detection.md says."""
    root = broken(coco_folder, tmp_path)
    made = data(root, **export(root))
    assert made.classes == ["cat", "dog"]
    assert len(made.train_set) >= 5
    assert len(made.val_set) >= 1
    assert made.train_set[0][0].shape[0] == made.val_set[0][0].shape[0] == 3
