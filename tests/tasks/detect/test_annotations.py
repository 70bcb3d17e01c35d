"""Annotation files: COCO's own are read, and errors name the damaged entry of others."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from involution.tasks.detect.annotations import AnnotationError, read_annotations

GOOD: dict[str, Any] = {
    "categories": [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}],
    "images": [
        {"id": 10, "file_name": "a.jpg", "width": 40, "height": 30},
        {"id": 11, "file_name": "b.jpg", "width": 20, "height": 20},
    ],
    "annotations": [
        {
            "id": 1,
            "image_id": 10,
            "category_id": 3,
            "bbox": [1, 2, 10.5, 20],
            "area": 100.0,
            "iscrowd": 0,
            "segmentation": [[1, 2, 11, 2, 11, 22]],
        },
        {
            "id": 2,
            "image_id": 10,
            "category_id": 7,
            "bbox": [0, 0, 40, 30],
            "iscrowd": 1,
            "segmentation": {"size": [30, 40], "counts": [600, 100, 500]},
        },
    ],
}


def write(folder: Path, content: Any) -> Path:
    for name in ("a.jpg", "b.jpg"):
        (folder / name).touch()
    file = folder / "instances.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return file


def test_a_good_file(tmp_path: Path) -> None:
    found = read_annotations(write(tmp_path, GOOD), tmp_path)
    assert [image.file for image in found.images] == ["a.jpg", "b.jpg"]
    assert found.categories == {3: "cat", 7: "dog"}
    assert [one.id for one in found.objects[10]] == [1, 2]
    assert found.objects[11] == []  # an image without objects is kept
    assert found.objects[10][0].box == (1, 2, 10.5, 20)
    assert [one.crowd for one in found.objects[10]] == [False, True]


def test_cocos_own_files(data_folder: Path) -> None:
    root = data_folder / "coco482"
    if not root.is_dir():
        pytest.skip(f"no {root}")
    for split, images, objects in (("train2017", 294, None), ("val2017", 188, None)):
        found = read_annotations(root / "annotations" / f"instances_{split}.json", root / split)
        assert len(found.images) == images
        assert len(found.categories) == 80
        assert sum(map(len, found.objects.values())) > 1000, objects


def put(*path: Any) -> Callable[[Any], Callable[[dict[str, Any]], None]]:
    """A change of a file's content: another value at a path of keys."""

    def with_value(value: Any) -> Callable[[dict[str, Any]], None]:
        def damage(content: dict[str, Any]) -> None:
            inner: Any = content
            for key in path[:-1]:
                inner = inner[key]
            inner[path[-1]] = value

        return damage

    return with_value


FIRST, CROWD = ("annotations", 0), ("annotations", 1)
IMAGE, CATEGORY = ("images", 1), ("categories", 1)
DAMAGES = [
    (put("images")(None), r"images must be a list, got None"),
    (put("annotations")({}), r"annotations must be a list, got \{\}"),
    (put("categories")("cat"), r"categories must be a list, got 'cat'"),
    (put(*CATEGORY)(7), r"categories\[1\] must be an object, got 7"),
    (put(*CATEGORY, "id")("7"), r"categories\[1\] \(id '7'\): id must be an integer, got '7'"),
    (put(*CATEGORY, "id")(3), r"categories\[1\] \(id 3\): id must be one that no other entry has, got 3"),
    (put(*CATEGORY, "id")(True), r"categories\[1\] \(id True\): id must be an integer, got True"),
    (put(*CATEGORY, "name")("cat"), r"categories\[1\] \(id 7\): name must be a new name, got 'cat'"),
    (put(*CATEGORY, "name")(" "), r"categories\[1\] \(id 7\): name must be a new name, got ' '"),
    (put(*CATEGORY, "name")(None), r"categories\[1\] \(id 7\): name must be a name, got None"),
    (put(*IMAGE)([]), r"images\[1\] must be an object, got \[\]"),
    (put(*IMAGE, "id")(None), r"images\[1\] \(id None\): id must be an integer"),
    (put(*IMAGE, "id")(10), r"images\[1\] \(id 10\): id must be one that no other entry has, got 10"),
    (put(*IMAGE, "file_name")(5), r"images\[1\] \(id 11\): file_name must be a file's name, got 5"),
    (put(*IMAGE, "file_name")("c.jpg"), r"images\[1\] \(id 11\): file_name must be a file in .*, got 'c.jpg'"),
    (put(*IMAGE, "file_name")("a.jpg"), r"images\[1\] .*: file_name must be a file that no other image has"),
    (put(*IMAGE, "file_name")("../b.jpg"), r"images\[1\] .*: file_name must be a path below the image folder"),
    (put(*IMAGE, "file_name")("/b.jpg"), r"images\[1\] .*: file_name must be a path below the image folder"),
    (put(*IMAGE, "width")(0), r"images\[1\] \(id 11\): width must be at least 1, got 0"),
    (put(*IMAGE, "height")(20.5), r"images\[1\] \(id 11\): height must be a whole number of pixels, got 20.5"),
    (put(*IMAGE, "height")(None), r"images\[1\] \(id 11\): height must be a whole number of pixels, got None"),
    (put(*FIRST)("box"), r"annotations\[0\] must be an object, got 'box'"),
    (put(*CROWD, "id")(1), r"annotations\[1\] \(id 1\): id must be one that no other entry has, got 1"),
    (put(*FIRST, "id")(1.5), r"annotations\[0\] \(id 1.5\): id must be an integer, got 1.5"),
    (put(*FIRST, "image_id")(12), r"annotations\[0\] .*: image_id must be the id of an image of this file, got 12"),
    (put(*FIRST, "image_id")([]), r"annotations\[0\] .*: image_id must be an image's id, got \[\]"),
    (put(*FIRST, "category_id")(1), r"annotations\[0\] .*: category_id must be the id of a category of this file"),
    (put(*FIRST, "category_id")(None), r"annotations\[0\] .*: category_id must be a category's id, got None"),
    (put(*FIRST, "bbox")(None), r"annotations\[0\] .*: bbox must be four finite numbers, got None"),
    (put(*FIRST, "bbox")([1, 2, 3]), r"annotations\[0\] .*: bbox must be four finite numbers, got \[1, 2, 3\]"),
    (put(*FIRST, "bbox")([1, 2, "3", 4]), r"annotations\[0\] .*: bbox must be four finite numbers"),
    (put(*FIRST, "bbox")([1, 2, float("nan"), 4]), r"annotations\[0\] .*: bbox must be four finite numbers"),
    (put(*FIRST, "bbox")([1, 2, float("inf"), 4]), r"annotations\[0\] .*: bbox must be four finite numbers"),
    (put(*FIRST, "bbox")([1, 2, 0, 4]), r"annotations\[0\] .*: bbox must be of positive width and height"),
    (put(*FIRST, "bbox")([1, 2, 3, -4]), r"annotations\[0\] .*: bbox must be of positive width and height"),
    (put(*FIRST, "bbox")([-2, 2, 3, 4]), r"annotations\[0\] .*: bbox must be inside its image of 40x30"),
    (put(*FIRST, "bbox")([30, 2, 12, 4]), r"annotations\[0\] .*: bbox must be inside its image of 40x30"),
    (put(*FIRST, "bbox")([50, 50, 3, 4]), r"annotations\[0\] .*: bbox must be inside its image of 40x30"),
    (put(*FIRST, "iscrowd")(2), r"annotations\[0\] .*: iscrowd must be 0 or 1, got 2"),
    (put(*FIRST, "area")(-1), r"annotations\[0\] .*: area must be a number that is not negative, got -1"),
    (put(*FIRST, "area")("big"), r"annotations\[0\] .*: area must be a number that is not negative, got 'big'"),
    (put(*FIRST, "segmentation")("all"), r"annotations\[0\] .*: segmentation must be polygons or run lengths"),
    (put(*FIRST, "segmentation")([[1, 2, 3, 4]]), r"annotations\[0\] .*: segmentation\[0\] must be at least three"),
    (put(*FIRST, "segmentation")([[1, 2, 3, 4, 5, 6, 7]]), r"annotations\[0\] .*: segmentation\[0\] must be at least"),
    (put(*FIRST, "segmentation")([[1, 2, 3, 4, 5, None]]), r"annotations\[0\] .*: segmentation\[0\] must be at least"),
    (put(*FIRST, "segmentation")([5]), r"annotations\[0\] .*: segmentation\[0\] must be at least three points"),
    (put(*CROWD, "segmentation", "size")([40, 30]), r"annotations\[1\] .*: segmentation.size must be \[30, 40\]"),
    (put(*CROWD, "segmentation", "counts")([600]), r"annotations\[1\] .*: segmentation.counts must be of 1200 pixels"),
    (put(*CROWD, "segmentation", "counts")([-1, 1201]), r"annotations\[1\] .*: segmentation.counts must be run length"),
    (
        put(*CROWD, "segmentation", "counts")(""),
        r"annotations\[1\] .*: segmentation.counts must be run lengths, got ''",
    ),
    (put(*CROWD, "segmentation", "counts")(None), r"annotations\[1\] .*: segmentation.counts must be run lengths"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES, ids=range(len(DAMAGES)))
def test_errors_name_the_damaged_entry(damage: Callable[[dict[str, Any]], None], message: str, tmp_path: Path) -> None:
    content = copy.deepcopy(GOOD)
    damage(content)
    with pytest.raises(AnnotationError, match=message) as caught:
        read_annotations(write(tmp_path, content), tmp_path)
    assert str(tmp_path / "instances.json") in str(caught.value)


@pytest.mark.parametrize("content", ["", "{", "[]", "3", '{"images": []}', '\ufeff{"images": []'])
def test_files_in_another_format(content: str, tmp_path: Path) -> None:
    with pytest.raises(AnnotationError, match=r"instances\.json"):
        read_annotations(write(tmp_path, content), tmp_path)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_annotations(tmp_path / "nowhere.json", tmp_path)


def test_boxes_may_exceed_the_edge_by_rounding(tmp_path: Path) -> None:
    content = copy.deepcopy(GOOD)
    content["annotations"][0]["bbox"] = [-0.5, 0, 41, 30.4]
    assert read_annotations(write(tmp_path, content), tmp_path).objects[10][0].box == (-0.5, 0, 41, 30.4)


def test_bad_objects_are_left_out_with_skip(tmp_path: Path) -> None:
    content = copy.deepcopy(GOOD)
    content["annotations"][0]["bbox"] = [1, 2, 10, 0]
    file = write(tmp_path, content)
    with pytest.warns(
        RuntimeWarning, match=r"left out 1 objects, the first: .*annotations\[0\] \(id 1\): bbox must be"
    ):
        found = read_annotations(file, tmp_path, on_error="skip")
    assert [one.id for one in found.objects[10]] == [2]
    content["images"][1]["width"] = 0
    with pytest.raises(AnnotationError, match=r"images\[1\] \(id 11\): width"):
        read_annotations(write(tmp_path, content), tmp_path, on_error="skip")


def test_categories_are_sorted_by_id(tmp_path: Path) -> None:
    content = copy.deepcopy(GOOD)
    content["categories"].reverse()
    assert list(read_annotations(write(tmp_path, content), tmp_path).categories) == [3, 7]


@pytest.mark.parametrize("used", [True, False])
def test_a_category_without_objects_may_have_the_name_of_another(used: bool, tmp_path: Path) -> None:
    """Roboflow's exports have a category for the project. If no category of a name has objects, the last one stays."""
    content = copy.deepcopy(GOOD)
    content["categories"] = [{"id": 0, "name": "cat"}, {"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}]
    if not used:
        content["annotations"] = []
    assert read_annotations(write(tmp_path, content), tmp_path).categories == {3: "cat", 7: "dog"}


def test_a_class_with_the_projects_name_is_merged_with_it(tmp_path: Path) -> None:
    content = copy.deepcopy(GOOD)
    content["categories"] = [
        {"id": 3, "name": "fish", "supercategory": "none"},
        {"id": 7, "name": "fish", "supercategory": "fish"},
    ]
    found = read_annotations(write(tmp_path, content), tmp_path)
    assert found.categories == {7: "fish"}
    assert [one.category for one in found.objects[10]] == [7, 7]


def test_integers_may_be_written_as_floats(tmp_path: Path) -> None:
    content = copy.deepcopy(GOOD)
    content["images"][0] |= {"id": 10.0, "width": 40.0, "height": 30.0}
    content["annotations"][0] |= {"image_id": 10.0, "category_id": 3.0}
    found = read_annotations(write(tmp_path, content), tmp_path)
    assert found.images[0][:1] + found.images[0][2:] == (10, 40, 30)
    assert all(type(value) is int for value in (found.images[0].id, found.images[0].width))
    assert found.objects[10][0].category == 3


def test_boxes_over_the_edge_are_clipped_for_training(tmp_path: Path) -> None:
    content = copy.deepcopy(GOOD)
    content["annotations"][0]["bbox"] = [-3, 2, 50, 20]
    file = write(tmp_path, content)
    with pytest.warns(RuntimeWarning, match=r"clipped 1 boxes, the first: .*bbox must be inside its image of 40x30"):
        found = read_annotations(file, tmp_path, on_error="skip")
    assert found.objects[10][0].box == (0, 2, 40, 20)


def test_the_ground_truth_is_never_changed(tmp_path: Path) -> None:
    content = copy.deepcopy(GOOD)
    boxes = [[-3, 2, 50, 20], [1, 2, 0, 4], [60, 60, 5, 5]]
    for number, box in enumerate(boxes):
        content["annotations"].append({**content["annotations"][0], "id": 1, "bbox": box, "area": number})
    content["annotations"].append({**content["annotations"][0], "image_id": 99})  # of an unknown image: left out
    file = write(tmp_path, content)
    with pytest.warns(RuntimeWarning, match="evaluated 4 objects as they are, the first"):
        found = read_annotations(file, tmp_path, on_error="skip", evaluation=True)
    assert [list(one.box) for one in found.objects[10]] == [[1, 2, 10.5, 20], [0, 0, 40, 30], *boxes]
    assert [one.area for one in found.objects[10][2:]] == [0, 1, 2]
    content["annotations"][0]["bbox"] = None
    with pytest.raises(AnnotationError, match=r"bbox must be four finite numbers, because evaluation skips no object"):
        read_annotations(write(tmp_path, content), tmp_path, on_error="skip", evaluation=True)


def test_a_file_of_boxes_alone_is_refused_for_masks(tmp_path: Path) -> None:
    content = copy.deepcopy(GOOD)
    for one in content["annotations"]:
        one["segmentation"] = []
    for on_error in ("raise", "skip"):
        with pytest.raises(AnnotationError, match="got 2 boxes without; faster_rcnn_rednetv2_50_fpn is a recipe"):
            read_annotations(write(tmp_path, content), tmp_path, masks=True, on_error=on_error)


def test_a_byte_order_mark(tmp_path: Path) -> None:
    file = write(tmp_path, GOOD)
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes().replace(b", ", b",\r\n"))
    assert len(read_annotations(file, tmp_path).images) == 2
