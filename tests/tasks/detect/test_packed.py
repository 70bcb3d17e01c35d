"""Packed annotations equal the ones they are made of, in little memory, which forked processes keep sharing."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from involution.tasks.detect import COCO
from involution.tasks.detect.annotations import Annotations, ObjectEntry, read_annotations
from involution.tasks.detect.annotations.packed import PackedObjects

POLYGONS = [[0.1, 2.25, 3.0, 7.5, 1e-3, 640.0], [1.0, 2.0, 3.5, 4.0, 5.0, 6.0]]
OBJECTS = {
    5: [ObjectEntry(900100474028, 2, (1.5, 2.25, 3.0, 4.0), False, POLYGONS, 9.75)],
    3: [],
    9: [
        ObjectEntry(7, 4, (0.1, 2.5, 3, 4), True, {"size": [2, 3], "counts": "0a\\`1"}, 9.5),
        ObjectEntry(8, 2, (1.0, 2.0, 3.0, 4.0), False, {"size": [2, 3], "counts": [1, 5]}, 0.0),
        ObjectEntry(6, 2, (1.0, 2.0, 3.0, 4.0), False, None, 12.0),
    ],
}


def test_packed_objects_equal_the_given_ones() -> None:
    found = PackedObjects(OBJECTS, segmentations=True)
    assert list(found.items()) == list(OBJECTS.items())
    assert len(found) == 3
    assert 4 not in found
    assert 10 not in found
    assert pickle.loads(pickle.dumps(found)) == OBJECTS
    without = PackedObjects(OBJECTS, segmentations=False)
    for image, objects in OBJECTS.items():
        assert without[image] == [one._replace(segmentation=None) for one in objects]
    assert PackedObjects({}, segmentations=True) == {}
    kept = Annotations([], {2: "a", 4: "b"}, found).only(["b"]).objects
    assert kept == {5: [], 3: [], 9: OBJECTS[9][:1]}


@pytest.mark.parametrize("masks", [False, True])
def test_the_data_module_packs(masks: bool, coco_folder: Path) -> None:
    data = COCO(str(coco_folder), num_workers=0, masks=masks)
    file, images = coco_folder / "annotations" / "instances_train2017.json", coco_folder / "train2017"
    objects = data.split("train").annotations.objects
    assert isinstance(objects, PackedObjects)
    plain = read_annotations(file, images, masks).objects
    assert {image: [one.box for one in found] for image, found in objects.items()} == {
        image: [one.box for one in found] for image, found in plain.items()
    }
    shapes = [one.segmentation for found in objects.values() for one in found]
    assert all(shape is not None for shape in shapes) == masks


def test_an_object_takes_at_most_70_bytes_and_its_segmentation() -> None:
    many = {image: [OBJECTS[5][0]] * 10 for image in range(1000)}
    assert PackedObjects(many, segmentations=False).nbytes < 70 * 10_000
    text = len(json.dumps(POLYGONS, separators=(",", ":")))
    assert PackedObjects(many, segmentations=True).nbytes < (78 + text) * 10_000


MEASURE = """
import json, os, resource, sys, time
from pathlib import Path
from involution.tasks.detect import COCO


def memory(file: str, field: str) -> int:  # bytes
    lines = [line.split() for line in Path("/proc/self", file).read_text().splitlines()]
    return 1024 * sum(int(line[1]) for line in lines if line[0].startswith(field))


root, masks = Path(sys.argv[1]), sys.argv[2] == "true"
before, started = memory("status", "VmRSS"), time.perf_counter()
data = COCO(str(root), train="many", val="many", masks=masks, num_workers=0, group_by_shape=False)
annotations = data.split("train").annotations
found = {"seconds": time.perf_counter() - started, "packed": annotations.objects.nbytes}
found |= {"resident": memory("status", "VmRSS") - before, "peak": memory("status", "VmHWM") - before}
pipes = [os.pipe() for _ in range(2)]
for _, writing in pipes:  # two workers, which read every object at the same time
    if os.fork() == 0:
        before, started = memory("smaps_rollup", "Private"), time.perf_counter()
        total = sum(len(annotations.objects[image.id]) for image in annotations.images)  # as the training set does
        one = {"objects": total, "copied": memory("smaps_rollup", "Private") - before}
        os.write(writing, json.dumps(one | {"worker_seconds": time.perf_counter() - started}).encode())
        os._exit(0)
workers = [json.loads(os.read(reading, 1000)) for reading, _ in pipes]
print(json.dumps(found | {name: max(one[name] for one in workers) for name in workers[0]}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("masks", ["false", "true"])
def test_a_million_objects(masks: str, tmp_path: Path) -> None:
    """Two forked workers read every object, and copy less than 50 bytes each; Python objects would take 2.1 kB."""
    (tmp_path / "annotations").mkdir()
    (tmp_path / "many").mkdir()
    corners = [round(10 + 3.37 * step, 2) for step in range(40)]  # COCO's polygons have about 40 coordinates
    images, objects = 120_000, 1_000_000
    with (tmp_path / "annotations" / "instances_many.json").open("w") as file:
        file.write('{"categories": [{"id": 1, "name": "thing"}], "images": [')
        file.write(",".join(f'{{"id":{n},"file_name":"{n}.jpg","width":640,"height":480}}' for n in range(images)))
        file.write('], "annotations": [')
        for number in range(objects):
            box = [10.5, 20.25, 30 + number % 100, 40.125]
            one = {"id": number + 1, "image_id": number * 7 % images, "category_id": 1, "bbox": box, "iscrowd": 0}
            file.write("," * (number > 0) + json.dumps({**one, "area": 1234.5, "segmentation": [corners]}))
        file.write("]}")
    for number in range(images):
        (tmp_path / "many" / f"{number}.jpg").touch()
    command = [sys.executable, "-c", MEASURE, str(tmp_path), masks]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    per_object = {name: round(found[name] / objects, 1) for name in ("packed", "resident", "peak", "copied")}
    print(
        f"masks {masks}: bytes per object {per_object}; seconds {found['seconds']:.0f}, {found['worker_seconds']:.0f}"
    )
    assert found["objects"] == objects
    assert found["packed"] < (400 if masks == "true" else 70) * objects
    assert found["copied"] < 50e6
