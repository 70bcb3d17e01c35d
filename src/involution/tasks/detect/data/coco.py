"""COCO, and any folder of its format."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from faster_coco_eval.core import mask as run_lengths
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors

from ....engine.data import IMAGENET_MEAN, IMAGENET_STD, TaskData
from ....engine.files import files_below
from ....engine.images import Header, SkipUnreadable, UnreadableImage, for_each, inspect, read_image
from ....engine.sampling import ResumableSampler
from ..preprocessing import Preprocessing, to_tensor, training
from ..targets import Targets
from .annotations import AnnotationError, Annotations, ImageEntry, ObjectEntry, read_annotations
from .packed import packed

Sample = tuple[Tensor, dict[str, Any]]


class Split(NamedTuple):
    """A part of the data: where its images are, what its annotation file says, and whether of upright images."""

    folder: Path
    annotations: Annotations
    upright: bool = True


class TrainingImages(Dataset[Sample]):
    """Images [3, H, W] with boxes [n, 4] (left, top, right, bottom), labels [n] from 1 on and, if asked for, masks.

    Crowds are left out.
    """

    def __init__(self, split: Split, images: Sequence[ImageEntry], transform: Any, masks: bool) -> None:
        self.split, self.images, self.transform, self.masks = split, images, transform, masks
        self._labels = {category: label for label, category in enumerate(split.annotations.categories, start=1)}

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Sample:
        entry = self.images[index]
        image = _read(self.split, entry)
        objects = [one for one in self.split.annotations.objects[entry.id] if not one.crowd]
        size = (entry.height, entry.width)
        corners = torch.tensor([one.corners for one in objects], dtype=torch.float32).reshape(-1, 4)
        target: dict[str, Any] = {
            "boxes": tv_tensors.BoundingBoxes(corners, format="XYXY", canvas_size=size),
            "labels": torch.tensor([self._labels[one.category] for one in objects], dtype=torch.int64),
        }
        if self.masks:
            shapes = [torch.from_numpy(mask_of(one, size)) for one in objects]
            target["masks"] = tv_tensors.Mask(torch.stack(shapes) if shapes else torch.zeros(0, *size).byte())
        result: Sample = self.transform(image, target)
        return result


class EvaluationImages(Dataset[Sample]):
    """Images [3, H, W] in 0..1, as large as they are, with their image_id."""

    def __init__(self, split: Split) -> None:
        self.split, self.transform = split, to_tensor()

    def __len__(self) -> int:
        return len(self.split.annotations.images)

    def __getitem__(self, index: int) -> Sample:
        entry = self.split.annotations.images[index]
        return self.transform(_read(self.split, entry)), {"image_id": entry.id}


def _read(split: Split, entry: ImageEntry) -> Any:
    file = split.folder / entry.file
    image = read_image(file, upright=split.upright)
    if image.size != (entry.width, entry.height):
        raise AnnotationError(_other_size(entry, file, image.size))
    return image


def _other_size(entry: ImageEntry, file: Path, size: tuple[int, int]) -> str:
    return (
        f"image {entry.id} must be {entry.width}x{entry.height}, as its annotation file says, got {file}, which is "
        f"{size[0]}x{size[1]}"
    )


def are_upright(split: Split, headers: dict[int, Header], orientation: str) -> bool:
    """Whether boxes are in the pixels of upright images, as EXIF turns them, or of images as they are stored.

    The sizes in the annotation file say so where an image is to be turned by a quarter; without such an image, upright
    is taken.

    Args:
        split: the images and annotations.
        headers: of the images, by id.
        orientation: "auto" to follow the sizes, "upright" or "stored" to say so.

    Raises:
        AnnotationError: sizes contradict each other, or `orientation`.
    """
    says: dict[str, ImageEntry] = {}
    turned = []
    for entry in split.annotations.images:
        header = headers.get(entry.id)
        if header is None or header.orientation == 1:
            continue
        turned.append(entry.file)
        if header.size != header.upright_size and (entry.width, entry.height) in (header.size, header.upright_size):
            kind = "upright" if (entry.width, entry.height) == header.upright_size else "stored"
            says.setdefault(kind, entry)
    wanted = set(says) if orientation == "auto" else {*says, orientation}
    if len(wanted) > 1:
        shown = " and ".join(f"{kind} images in {split.folder / entry.file}" for kind, entry in says.items())
        raise AnnotationError(
            f"orientation must be what the annotation file's sizes say, got {orientation!r}, and sizes of {shown}"
        )
    if turned and not wanted:
        rank_zero_warn(
            f"{len(turned)} images in {split.folder} have an EXIF orientation, {turned[0]} the first, and no size "
            "tells whether boxes are in upright or stored pixels: upright is taken; data.orientation says otherwise"
        )
    return "stored" not in wanted


def mask_of(entry: ObjectEntry, size: tuple[int, int]) -> Any:
    """An object's mask, [H, W] of 0 and 1, as a uint8 array."""
    return run_lengths.decode(runs_of(entry, size))


def runs_of(entry: ObjectEntry, size: tuple[int, int]) -> Any:
    """An object's mask as compressed run lengths."""
    shape = entry.segmentation
    if isinstance(shape, list):
        return run_lengths.merge(run_lengths.frPyObjects(shape, *size))
    return shape if isinstance(shape["counts"], str) else run_lengths.frPyObjects(shape, *size)


def batch(samples: list[Sample]) -> tuple[list[Tensor], Targets]:
    """Images, as a list, for their sizes differ, and targets."""
    return [image for image, _ in samples], Targets([target for _, target in samples])


class GroupedSampler(ResumableSampler):
    """Batches of images that are all wide or all tall, so that little of a batch is padding.

    Each process groups its own part. What is left of both kinds at an epoch's end comes last.

    Args:
        wide: of every image.
        batch_size: of a batch.
        **resumable: see `ResumableSampler`.
    """

    def __init__(self, wide: Sequence[bool], batch_size: int, **resumable: Any) -> None:
        super().__init__(**resumable)
        self._wide, self._batch_size = wide, batch_size

    def order(self) -> list[int]:
        """This process's indices of the epoch."""
        ordered: list[int] = []
        waiting: dict[bool, list[int]] = {True: [], False: []}
        for index in super().order():
            kind = waiting[self._wide[index]]
            kind.append(index)
            if len(kind) == self._batch_size:
                ordered += kind
                kind.clear()
        return ordered + waiting[True] + waiting[False]


class COCO(TaskData):
    """COCO's folders, or any of their format: root/train2017/*.jpg, root/annotations/instances_train2017.json.

    Training batches are (images, targets): a list of [3, H, W] float32 in 0..1, and `Targets`, dictionaries of boxes
    [n, 4] in pixels (left, top, right, bottom), labels [n] from 1 on in the order of the annotation file's categories
    and, where `masks`, masks [n, H, W] uint8. Images are flipped by chance, and scaled. In evaluation, images are as
    large as they are, and a target is the image_id. Annotation files are checked entry by entry before training starts.

    Args:
        root: the folder.
        train: name of the part to train on.
        val: of the part to validate on; None holds `val_fraction` of the training images out.
        test: of the part to test on; None takes that of `val`, for COCO's own test images have no public annotations.
        val_fraction: of the training images, always the same ones, where `val` is None.
        annotations: the annotation file below root, {split} being the part's name.
        images: the image folder below root, likewise.
        categories: names of those to keep, in this order; None keeps all. Objects of others are left out.
        batch_size: images per batch (per process).
        num_workers: loading processes per loader; None shares this machine's cores among its training processes.
        min_size: pixels of the shorter side in evaluation.
        max_size: at most so many pixels of the longer side, in evaluation and training.
        train_min_sizes: the shorter side in training, one by chance; None is `min_size`.
        jitter: large-scale jitter in its place: the range of the scale, (0.1, 2.0) in the literature, of what fits into
            a square of `max_size`; that square is cut out, or filled up.
        flip: probability of a flip from left to right.
        masks: read masks, which Mask R-CNN wants.
        empty_images: train on images without objects, too; they are always evaluated.
        group_by_shape: training batches are of wide images or of tall ones.
        orientation: boxes and masks are in the pixels of "upright" images, as EXIF turns them, or of images as they are
            "stored"; "auto" takes what the sizes in the annotation file say.
        check_files: look into every image file before anything starts (in milliseconds each): it must be there as a
            whole, and of the annotated size. Without it, "auto" means "upright".
        on_error: "raise" where an image or the entry of an object is not right, or "skip" to leave it out of training,
            after a warning; boxes that reach over the edge are clipped then. COCO's own training file has a box of no
            area. Evaluation takes the file as it is, and every image.

    Raises:
        AnnotationError: an entry of an annotation file is not right; the first one is named.
        FileNotFoundError: a file or folder is missing.
        ValueError: another argument does not fit.
    """

    collate = staticmethod(batch)
    drop_single = False  # images are large: their statistics are of many positions

    def __init__(
        self,
        root: str,
        train: str = "train2017",
        val: str | None = "val2017",
        test: str | None = None,
        val_fraction: float = 0.1,
        annotations: str = "annotations/instances_{split}.json",
        images: str = "{split}",
        categories: list[str] | None = None,
        batch_size: int = 2,
        num_workers: int | None = None,
        min_size: int = 800,
        max_size: int = 1333,
        train_min_sizes: list[int] | None = None,
        jitter: tuple[float, float] | None = None,
        flip: float = 0.5,
        masks: bool = False,
        empty_images: bool = False,
        group_by_shape: bool = True,
        orientation: str = "auto",
        check_files: bool = True,
        on_error: str = "raise",
    ) -> None:
        super().__init__(batch_size, num_workers)
        sizes = [min_size] if train_min_sizes is None else train_min_sizes
        if not sizes or min(*sizes, min_size, max_size) < 1:
            raise ValueError(
                f"min_size, max_size and train_min_sizes must be at least 1, got {min_size}, {max_size}, {sizes}"
            )
        if max_size < max(*sizes, min_size):
            raise ValueError(f"max_size must be at least the shorter sides' {max(*sizes, min_size)}, got {max_size}")
        if jitter is not None and not 0 < jitter[0] <= jitter[1]:
            raise ValueError(f"jitter must be a range of positive scales, got {jitter!r}")
        if on_error not in ("raise", "skip"):
            raise ValueError(f"on_error must be raise or skip, got {on_error!r}")
        if not 0 <= flip <= 1:
            raise ValueError(f"flip must be a probability, got {flip!r}")
        if orientation not in ("auto", "upright", "stored"):
            raise ValueError(f"orientation must be auto, upright or stored, got {orientation!r}")
        if not 0 < val_fraction < 1:
            raise ValueError(f"val_fraction must be between 0 and 1, got {val_fraction!r}")
        self.on_error, self.orientation, self.check_files = on_error, orientation, check_files
        self.val_fraction = val_fraction
        self.root, self.masks, self.empty_images, self.group_by_shape = Path(root), masks, empty_images, group_by_shape
        self._names: dict[str, str | None] = {"train": train, "val": val, "test": test or val}
        self._places, self._kept = (images, annotations), categories
        self.preprocessing = Preprocessing(min_size, max_size, IMAGENET_MEAN, IMAGENET_STD)
        self._training = training(self.preprocessing, sizes, jitter, flip)
        self._splits: dict[tuple[str, bool], Split] = {}
        self._checked: set[tuple[str, bool]] = set()

    def split(self, part: str) -> Split:
        """What the annotation file of "train", "val" or "test" says; read once."""
        key = self._key(part)
        if key not in self._splits:
            name, evaluation = self._names[part] or self._names["train"], part != "train"
            images, annotations = (self.root / place.format(split=name) for place in self._places)
            if not images.is_dir():
                raise FileNotFoundError(
                    f"root must hold the images of {part}, got {self.root}: no folder {images}; data.images is the "
                    f"folder's pattern, data.{part} the part's name"
                )
            if not annotations.is_file():
                files = sorted(str(file.relative_to(self.root)) for file in files_below(self.root, (".json",)))
                raise FileNotFoundError(
                    f"root must hold the annotations of {part}, got {self.root}: no {annotations}; data.annotations is "
                    f"the file's pattern, data.{part} the part's name; there are {_some(files)}"
                )
            found = read_annotations(annotations, images, self.masks, self.on_error, evaluation)
            found = found if self._kept is None else found.only(self._kept)
            if self._names["val"] is None and name == self._names["train"]:
                found = found.part(self.val_fraction, evaluation)
            self._splits[key] = Split(images, packed(found, self.masks))
        return self._splits[key]

    def _key(self, part: str) -> tuple[str, bool]:
        """Training and evaluation read the same file in two ways."""
        return self._names[part] or "", part == "train"

    def _checked_split(self, part: str) -> Split:
        """The same, its image files checked: those to train on that are not right are left out where they may be."""
        split, key = self.split(part), self._key(part)
        if not self.check_files:
            return self._splits.setdefault(key, split._replace(upright=self.orientation != "stored"))
        if key in self._checked:
            return split
        images = split.annotations.images
        results = self._by_first(
            lambda: for_each([split.folder / one.file for one in images], inspect, f"images of {part}")
        )
        headers = {one.id: found for one, found in zip(images, results, strict=True) if isinstance(found, Header)}
        upright = are_upright(split, headers, self.orientation)
        problems: dict[int, ValueError] = {}
        for entry, found in zip(images, results, strict=True):
            if isinstance(found, UnreadableImage):
                problems[entry.id] = found
                continue
            size = found.upright_size if upright else found.size
            if size != (entry.width, entry.height):
                problems[entry.id] = AnnotationError(_other_size(entry, split.folder / entry.file, size))
        if problems:
            first = next(iter(problems.values()))
            if self.on_error == "raise":
                raise first
            if part != "train":
                raise ValueError(f"{first}; on_error=skip leaves images out of training, and none out of evaluation")
            rank_zero_warn(f"left out {len(problems)} images, the first: {first} (on_error=skip)")
        kept = split.annotations._replace(images=[one for one in images if one.id not in problems])
        self._splits[key] = split._replace(annotations=kept, upright=upright)
        self._checked.add(key)
        return self._splits[key]

    @cached_property
    def classes(self) -> list[str]:  # type: ignore[override]  # known once the files are read
        """The categories of the file of `val`, which the others must have too, or those that are kept."""
        return list(self.split("val").annotations.categories.values())

    def setup(self, stage: str) -> None:
        """Reads what the stage needs, and checks that the parts have the same categories."""
        needed = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}.get(stage, ())
        wanted = self.split("val").annotations.categories
        for part in needed:
            found = self.split(part).annotations.categories
            if found != wanted:
                raise ValueError(f"the categories of {part} must be those of val, {wanted}, got {found}")
        for part in needed:
            split = self._checked_split(part)
            if part != "train":
                setattr(self, f"{part}_set", EvaluationImages(split))
                continue
            kept = [image for image in split.annotations.images if self.empty_images or self._has_objects(split, image)]
            if not kept:
                raise ValueError(f"the images of train must hold objects, got none in {split.folder}")
            self._say_unused(split)
            self._train_images = kept
            dataset = TrainingImages(split, kept, self._training, self.masks)
            self.train_set = SkipUnreadable(dataset) if self.on_error == "skip" else dataset

    def _say_unused(self, split: Split) -> None:
        """Names the classes that training never sees."""
        seen = {one.category for found in split.annotations.objects.values() for one in found if not one.crowd}
        unused = [name for category, name in split.annotations.categories.items() if category not in seen]
        if unused:
            rank_zero_warn(f"no object to train on is of {_some(unused)}; data.categories names the categories to keep")

    def _has_objects(self, split: Split, image: ImageEntry) -> bool:
        return any(not one.crowd for one in split.annotations.objects[image.id])

    def _order(self) -> dict[str, Any]:
        return super()._order() | {"group_by_shape": self.group_by_shape}

    def _sampler(self, seed: int) -> ResumableSampler:
        if not self.group_by_shape:
            return super()._sampler(seed)
        wide = [image.width >= image.height for image in self._train_images]
        replicas, rank = self._processes()
        return GroupedSampler(wide, self.batch_size, dataset=self.train_set, seed=seed, replicas=replicas, rank=rank)


def _some(names: Sequence[str]) -> str:
    """The first few of them."""
    rest = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + rest if names else "none"
