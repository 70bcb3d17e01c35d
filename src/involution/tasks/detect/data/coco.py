"""COCO, and any folder of its format."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

from involution.engine.data import IMAGENET_MEAN, IMAGENET_STD, TaskData
from involution.engine.files import files_below
from involution.engine.images import Header, SkipUnreadable, UnreadableImage, for_each, inspect
from involution.engine.sampling import ResumableSampler

from ..annotations import ImageEntry, read_annotations
from ..annotations.packed import packed
from ..preprocessing import Preprocessing, training
from .images import EvaluationImages, Split, TrainingImages, another_size, batch
from .orientation import are_upright
from .sampling import GroupedSampler


class COCO(TaskData):
    """COCO's folders, or any of their format: root/train2017/*.jpg, root/annotations/instances_train2017.json.

    Training batches are (images, targets): a list of [3, H, W] float32 in 0..1, and `Targets`, dictionaries of boxes
    [n, 4] in pixels (left, top, right, bottom), labels [n] from 1 on in the order of category ids and, if `masks`,
    masks [n, H, W] uint8. Images are flipped at random, and scaled. In evaluation, images keep their size, and a target
    is the image_id. Annotation files are checked entry by entry before training starts.

    Args:
        root: the folder.
        train: name of the part to train on.
        val: name of the part to validate on; None holds `val_fraction` of the training images out.
        test: name of the part to test on; None takes `val`, because COCO's test images have no public annotations.
        val_fraction: fraction of the training images, always the same ones, if `val` is None.
        annotations: the annotation file below root, {split} being the part's name.
        images: the image folder below root, likewise.
        categories: names of the categories to keep, in this order; None keeps all. Objects of others are left out.
        batch_size: images per batch (per process).
        num_workers: loading processes per loader; None shares this machine's cores among its training processes.
        min_size: pixels of the shorter side in evaluation.
        max_size: maximum of the longer side in pixels, in evaluation and training.
        train_min_sizes: pixels of the shorter side in training, chosen at random; None is `min_size`.
        jitter: large-scale jitter instead: the range of the scale, (0.1, 2.0) in the literature, relative to what fits
            into a square of `max_size`; the image is cropped or padded to that square.
        flip: probability of a horizontal flip.
        masks: read masks, which Mask R-CNN needs.
        empty_images: train on images without objects, too; they are always evaluated.
        group_by_shape: a training batch holds wide images or tall ones, not both.
        orientation: boxes and masks are in the pixels of "upright" images, as EXIF turns them, or of images as they are
            "stored"; "auto" follows the sizes in the annotation file.
        check_files: check every image file before anything starts (milliseconds each): it must be complete and of the
            annotated size. Without this check, "auto" means "upright".
        on_error: "raise" for an image or an object's entry that is not right, or "skip" to leave it out of training,
            with a warning, and to clip boxes that reach over the edge. COCO's own training file has a box without area.
            Evaluation takes the file as it is, and every image.

    Raises:
        AnnotationError: an entry of an annotation file is not right; the first one is named.
        FileNotFoundError: a file or folder is missing.
        ValueError: another argument is not valid.
    """

    collate = staticmethod(batch)

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
        _check_sizes(min_size, max_size, sizes)
        self.drop_single = min(sizes) <= 32  # else batch norms of one image average over several positions
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
        self._patterns, self._kept = (images, annotations), categories
        self.preprocessing = Preprocessing(min_size, max_size, IMAGENET_MEAN, IMAGENET_STD)
        self._training = training(self.preprocessing, sizes, jitter, flip)
        self._splits: dict[tuple[str, bool], Split] = {}
        self._checked: set[tuple[str, bool]] = set()

    def split(self, part: str) -> Split:
        """The annotations of "train", "val" or "test"; the file is read once."""
        key = self._key(part)
        if key not in self._splits:
            name, evaluation = self._names[part] or self._names["train"], part != "train"
            images, annotations = (self.root / pattern.format(split=name) for pattern in self._patterns)
            self._check_paths(part, images, annotations)
            found = read_annotations(annotations, images, self.masks, self.on_error, evaluation)
            found = found if self._kept is None else found.only(self._kept)
            if self._names["val"] is None and name == self._names["train"]:
                found = found.part(self.val_fraction, evaluation)
            self._splits[key] = Split(images, packed(found, self.masks))
        return self._splits[key]

    def _key(self, part: str) -> tuple[str, bool]:
        """Training and evaluation read the same file in two ways."""
        return self._names[part] or "", part == "train"

    def _check_paths(self, part: str, images: Path, annotations: Path) -> None:
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

    def _checked_split(self, part: str) -> Split:
        """`split` with checked image files; with on_error="skip", training leaves out those that are not right."""
        split, key = self.split(part), self._key(part)
        if key in self._checked:
            return split
        if not self.check_files:
            self._splits[key] = split._replace(upright=self.orientation != "stored")
            return self._splits[key]
        images = split.annotations.images
        results = self._by_first(
            lambda: for_each([split.folder / one.file for one in images], inspect, f"images of {part}")
        )
        headers = {one.id: found for one, found in zip(images, results, strict=True) if isinstance(found, Header)}
        split = split._replace(upright=are_upright(split, headers, self.orientation))
        problems = _problems(split, results)
        if problems:
            self._report(part, next(iter(problems.values())), len(problems))
        kept = split.annotations._replace(images=[one for one in images if one.id not in problems])
        self._splits[key] = split._replace(annotations=kept)
        self._checked.add(key)
        return self._splits[key]

    def _report(self, part: str, first: ValueError, count: int) -> None:
        """Raises the first image's error, or warns that training continues without `count` images."""
        if self.on_error == "raise":
            raise first
        if part != "train":
            raise ValueError(f"{first}; on_error=skip leaves images out of training, and none out of evaluation")
        rank_zero_warn(f"left out {count} images, the first: {first} (on_error=skip)")

    @cached_property
    def classes(self) -> list[str]:  # type: ignore[override]  # known once the files are read
        """The categories of the file of `val`, which the others must have too, or those that are kept."""
        return list(self.split("val").annotations.categories.values())

    def setup(self, stage: str) -> None:
        """Reads the parts that the stage needs, and checks that they have the same categories."""
        needed = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}.get(stage, ())
        wanted = self.split("val").annotations.categories
        for part in needed:
            found = self.split(part).annotations.categories
            if found != wanted:
                raise ValueError(f"the categories of {part} must be those of val, {wanted}, got {found}")
        for part in needed:
            split = self._checked_split(part)
            if part == "train":
                self._train_images = self._images_to_train_on(split)
                dataset = TrainingImages(split, self._train_images, self._training, self.masks)
                self.train_set = SkipUnreadable(dataset) if self.on_error == "skip" else dataset
            else:
                setattr(self, f"{part}_set", EvaluationImages(split))

    def _images_to_train_on(self, split: Split) -> list[ImageEntry]:
        """Those with objects, or all if `empty_images`; warns of classes without objects."""
        kept, seen = [], set()
        for image in split.annotations.images:
            found = {one.category for one in split.annotations.objects[image.id] if not one.crowd}
            seen |= found
            if found or self.empty_images:
                kept.append(image)
        if not kept:
            raise ValueError(f"the images of train must hold objects, got none in {split.folder}")
        unused = [name for category, name in split.annotations.categories.items() if category not in seen]
        if unused:
            rank_zero_warn(f"no object to train on is of {_some(unused)}; data.categories names the categories to keep")
        return kept

    def _order(self) -> dict[str, Any]:
        return super()._order() | {"group_by_shape": self.group_by_shape}

    def _sampler(self, seed: int) -> ResumableSampler:
        if not self.group_by_shape:
            return super()._sampler(seed)
        wide = [image.width >= image.height for image in self._train_images]
        replicas, rank = self._processes()
        return GroupedSampler(wide, self.batch_size, dataset=self.train_set, seed=seed, replicas=replicas, rank=rank)


def _check_sizes(min_size: int, max_size: int, train_min_sizes: Sequence[int]) -> None:
    if not train_min_sizes or min(*train_min_sizes, min_size, max_size) < 1:
        raise ValueError(
            "min_size, max_size and train_min_sizes must be at least 1, got "
            f"{min_size}, {max_size}, {list(train_min_sizes)}"
        )
    shorter = max(*train_min_sizes, min_size)
    if max_size < shorter:
        raise ValueError(f"max_size must be at least the shorter sides' {shorter}, got {max_size}")


def _problems(split: Split, results: Sequence[Header | UnreadableImage]) -> dict[int, ValueError]:
    """The errors of image files that cannot be read or have another size than annotated, by image id."""
    problems: dict[int, ValueError] = {}
    for entry, found in zip(split.annotations.images, results, strict=True):
        if isinstance(found, UnreadableImage):
            problems[entry.id] = found
            continue
        size = found.upright_size if split.upright else found.size
        if size != (entry.width, entry.height):
            problems[entry.id] = another_size(entry, split.folder / entry.file, size)
    return problems


def _some(names: Sequence[str]) -> str:
    """The first five names, and how many there are besides."""
    rest = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + rest if names else "none"
