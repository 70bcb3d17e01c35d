"""`involution predict`: a checkpoint, images, and a folder for the results; the same for every task.

A checkpoint of `involution fit` says which task it is for. The task's Lightning module has, for this command:

- `read(file)`: an image as the network wants it;
- `collate(images)`: several of them as a batch for its `predict_step`, which gives one output an image;
- `look(...)`: sets how images are looked at; its arguments are options;
- `writer(folder, files, ...)`: an object whose `add(index, output)` takes each file's output, in any order, and writes
  it, and whose `close()` writes what wants all of them, and says so; its further arguments are options.

What has been written stays, whatever comes after it.
"""

import argparse
import importlib
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser
from jsonargparse.typing import NonNegativeInt, PositiveInt
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from torchvision.datasets.folder import IMG_EXTENSIONS

from .console import on_a_terminal, quiet_lightning
from .files import files_below
from .images import UnreadableImage, cores

TASKS = {
    "classify": "Classifier",
    "detect": "Detector",
    "segment": "Segmenter",
}  # the room, and the Lightning module in it


class ImageFiles(IterableDataset[tuple[int, Any]]):
    """Image files as a module reads them, each with its place in the list; workers share them.

    Args:
        files: to read.
        read: a file as the network wants it; raises UnreadableImage for a broken one.
        on_error: "raise", or "skip" to go on with the next, after a warning.
    """

    def __init__(self, files: list[Path], read: Callable[[Path], Any], on_error: str) -> None:
        self.files, self.read, self.on_error = files, read, on_error

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        for index in range(first, len(self.files), step):
            try:
                image = self.read(self.files[index])
            except UnreadableImage as error:
                if self.on_error == "raise":
                    raise
                warnings.warn(f"skipped: {error}", RuntimeWarning, stacklevel=1)
                continue
            yield index, image


def image_files(path: Path) -> list[Path]:
    """The file itself, or all images below a folder, sorted; hidden files and folders are skipped.

    Raises:
        FileNotFoundError: there is neither, or the folder holds no image.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"data.predict_path must be an image or a folder of images, got {path}")
    found = list(files_below(path, IMG_EXTENSIONS))
    if not found:
        raise FileNotFoundError(f"data.predict_path must hold images ({', '.join(IMG_EXTENSIONS)}), got {path}")
    return found


def task_of(checkpoint: Path, argument: str = "ckpt_path") -> Any:
    """The Lightning module's class that a checkpoint is for.

    Args:
        checkpoint: of `involution fit`.
        argument: what errors call it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no checkpoint of `involution fit`.
    """
    if not checkpoint.is_file():
        raise FileNotFoundError(f"{argument} must be a checkpoint, got {checkpoint}, which is no file")
    try:
        content = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
        task = content["involution"]["task"]
    except Exception as error:  # torch's errors for a file that is none of its own are of many kinds
        raise ValueError(f"{argument} must be a checkpoint of involution fit, got {checkpoint}: {error!r}") from error
    if task not in TASKS:
        raise ValueError(
            f"{argument} must be of a task among {', '.join(TASKS)}, got {checkpoint}, which is of {task!r}"
        )
    return getattr(importlib.import_module(f".{task}", __package__), TASKS[task])


def main(arguments: list[str]) -> None:
    """Predicts.

    Args:
        arguments: of the verb.

    Raises:
        FileNotFoundError: the checkpoint or the images are not there.
        ValueError: the checkpoint or an image cannot be read, or an option does not fit.
        SystemExit: an argument is wrong or missing (the message is on stderr).
    """
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--ckpt_path")  # it decides which options there are
    checkpoint = first.parse_known_args(arguments)[0].ckpt_path
    task: Any = task_of(Path(checkpoint)) if checkpoint else None
    parser, looks, writes = _parser(task)
    options = parser.parse_args(arguments)
    quiet_lightning()
    files = image_files(Path(options.data.predict_path))
    folder = Path(options.output)
    if folder.resolve() in {file.resolve().parent for file in files}:
        raise ValueError(f"output must be another folder than the images', which pictures would replace, got {folder}")
    folder.mkdir(parents=True, exist_ok=True)
    model = task.load_from_checkpoint(options.ckpt_path, map_location="cpu", weights_only=True)
    model.configure_inference(**{name: options[name] for name in looks})
    writer = model.writer(folder, files, **{name: options[name] for name in writes})
    dataset = ImageFiles(files, model.read, options.data.on_error)
    collate = partial(_with_indices, model.collate)
    batches = -(-len(files) // options.data.batch_size)
    workers = options.data.num_workers
    if workers is None:
        workers = min(cores(), batches) if batches > 1 else 0
    loader = DataLoader(dataset, options.data.batch_size, num_workers=workers, collate_fn=collate)
    trainer = Trainer(
        **options.trainer, devices=1, logger=False, enable_checkpointing=False, enable_model_summary=False
    )
    predicting = _Predicting(model, writer.add)
    try:
        trainer.predict(predicting, loader, return_predictions=False)
        if predicting.done < len(files):
            print(f"skipped {len(files) - predicting.done} of {len(files)} files, which cannot be read")
    finally:
        if predicting.done:
            writer.close()


def _with_indices(collate: Callable[[list[Any]], Any], samples: list[tuple[int, Any]]) -> tuple[list[int], Any]:
    return [index for index, _ in samples], collate([image for _, image in samples])


class _Predicting(LightningModule):
    """Hands on what a module predicts, image by image, and counts them."""

    def __init__(self, model: LightningModule, add: Callable[[int, Any], None]) -> None:
        super().__init__()
        self.model, self.add, self.done = model, add, 0

    def predict_step(self, batch: tuple[list[int], Any], batch_idx: int) -> list[int]:
        """The images' indices among the files."""
        indices, images = batch
        for index, output in zip(indices, self.model.predict_step(images, batch_idx), strict=True):
            self.add(index, output)
            self.done += 1
        return indices


def _parser(task: Any) -> tuple[ArgumentParser, list[str], list[str]]:
    """The command's options, and the names of those that are the task's: of `look`, and of `writer`."""
    parser = ArgumentParser(
        prog="involution predict",
        description="Runs a checkpoint over images. The checkpoint knows its task, model, classes and preprocessing; "
        "with --ckpt_path, --help shows the task's own options too.",
    )
    parser.add_argument("--ckpt_path", required=True, type=str, help="a checkpoint of involution fit")
    parser.add_argument("--data.predict_path", required=True, type=str, help="an image, or a folder of images")
    parser.add_argument("--data.batch_size", default=16, type=PositiveInt, help="images per batch")
    workers = "loading processes; by default one per core, none for a single batch"
    parser.add_argument("--data.num_workers", default=None, type=NonNegativeInt | None, help=workers)
    parser.add_argument("--data.on_error", default="raise", choices=["raise", "skip"], help="where a file is broken")
    parser.add_argument("--output", required=True, type=str, help="the folder for the results")
    parser.add_argument("--trainer.accelerator", default="auto", type=str, help="auto, cpu, gpu, ...")
    parser.add_argument("--trainer.precision", default="32-true", type=str, help="32-true, bf16-mixed, ...")
    parser.add_argument("--trainer.enable_progress_bar", default=on_a_terminal(), type=bool)
    if task is None:
        return parser, [], []
    looks = parser.add_method_arguments(task, "look")
    writes = parser.add_method_arguments(task, "writer", skip={"folder", "files"})
    return parser, looks, writes
