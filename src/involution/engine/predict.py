"""`involution predict`: a checkpoint, images, and a folder for the results; the same for every task.

The checkpoint names its task's Lightning module. `TaskModule` declares what this command uses: `read` and `collate`
make batches, `configure_inference` and `writer` define the task's own options, `predict_step` returns one output per
image, and the writer's `add` and `close` write them.

Each image is decoded once. Results written before an error are kept.
"""

import argparse
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jsonargparse import ArgumentParser
from jsonargparse.typing import NonNegativeInt, PositiveInt
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from torchvision.transforms.v2.functional import pil_to_tensor

from .checkpoints import load_module, module_class
from .console import on_a_terminal, quiet_lightning
from .files import files_below
from .images import ENDINGS, UnreadableImage, cores, read_image
from .module import Reader, TaskModule
from .writer import PredictionWriter


class Sample(NamedTuple):
    """An image file: its place in the list, the network's input and, for the writer, its pixels [3, H, W] uint8."""

    place: int
    image: Any
    pixels: Tensor | None


class ImageFiles(IterableDataset[Sample]):
    """Decodes and preprocesses image files; loader workers share them.

    Args:
        files: to read.
        reader: the preprocessing.
        on_error: "raise", or "skip" to continue with the next file, after a warning.
        pictures: the number of files, from the first on, whose samples carry their pixels.
    """

    def __init__(self, files: list[Path], reader: Reader, on_error: str, pictures: int = 0) -> None:
        self.files, self.reader, self.on_error, self.pictures = files, reader, on_error, pictures

    def __iter__(self) -> Iterator[Sample]:
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        for index in range(first, len(self.files), step):
            try:
                image = read_image(self.files[index])
            except UnreadableImage as error:
                if self.on_error == "raise":
                    raise
                warnings.warn(f"skipped: {error}", RuntimeWarning, stacklevel=1)
                continue
            yield Sample(index, self.reader.prepare(image), pil_to_tensor(image) if index < self.pictures else None)


class Batch(NamedTuple):
    """Samples together; `images` is what the task's `predict_step` takes."""

    indices: list[int]
    images: Any
    pixels: list[Tensor | None]


def _batch(collate: Callable[[list[Any]], Any], samples: list[Sample]) -> Batch:
    indices, images, pixels = map(list, zip(*samples, strict=True))
    return Batch(indices, collate(images), pixels)


def image_files(path: Path) -> list[Path]:
    """The file itself, or all images below a folder, sorted; hidden files and folders are skipped.

    Raises:
        FileNotFoundError: the path is neither, or the folder holds no image.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"data.predict_path must be an image or a folder of images, got {path}")
    found = list(files_below(path, ENDINGS))
    if not found:
        raise FileNotFoundError(f"data.predict_path must hold images ({', '.join(ENDINGS)}), got {path}")
    return found


def main(arguments: list[str]) -> None:
    """Runs the command.

    Args:
        arguments: after the verb.

    Raises:
        FileNotFoundError: the checkpoint or the images do not exist.
        ValueError: the checkpoint or an image cannot be read, or an option does not fit.
        SystemExit: an argument is wrong or missing (the message is on stderr).
    """
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--ckpt_path")  # its task decides which options exist
    checkpoint = first.parse_known_args(arguments)[0].ckpt_path
    task = module_class(Path(checkpoint)) if checkpoint else None
    parser, inference_names, writer_names = _parser(task)
    options = parser.parse_args(arguments)
    quiet_lightning()
    files = image_files(Path(options.data.predict_path))
    folder = Path(options.output)
    if folder.resolve() in {file.resolve().parent for file in files}:
        raise ValueError(f"output must be another folder than the images', which pictures would replace, got {folder}")
    folder.mkdir(parents=True, exist_ok=True)
    model = load_module(Path(options.ckpt_path))
    model.configure_inference(**{name: options[name] for name in inference_names})
    writer = model.writer(folder, files, **{name: options[name] for name in writer_names})
    _predict(model, files, writer, options)


def _predict(model: TaskModule, files: list[Path], writer: PredictionWriter, options: Any) -> None:
    """Runs the model over all files; the writer also closes after an error."""
    batch_size, workers = options.data.batch_size, options.data.num_workers
    batches = -(-len(files) // batch_size)
    if workers is None:
        workers = min(cores(), batches) if batches > 1 else 0
    dataset = ImageFiles(files, model.read, options.data.on_error, writer.pictures)
    collate = partial(_batch, model.collate)
    ahead = 1 if workers else None  # batches ahead per worker: decoded photographs are large
    loader = DataLoader(dataset, batch_size, num_workers=workers, collate_fn=collate, prefetch_factor=ahead)
    trainer = Trainer(
        **options.trainer, devices=1, logger=False, enable_checkpointing=False, enable_model_summary=False
    )
    predicting = _Predicting(model, writer)
    try:
        trainer.predict(predicting, loader, return_predictions=False)
        if predicting.done < len(files):
            print(f"skipped {len(files) - predicting.done} of {len(files)} files, which cannot be read")
    finally:
        if predicting.done:
            writer.close()


class _Predicting(LightningModule):
    """Passes each output of a task's module to the writer.

    Lightning's BasePredictionWriter learns indices from the batch sampler, which an iterable data set does not have.
    """

    def __init__(self, model: TaskModule, writer: PredictionWriter) -> None:
        super().__init__()
        self.model, self.writer, self.done = model, writer, 0

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """Moves the images; pixels stay on the CPU, where pictures are drawn."""
        moved = super().transfer_batch_to_device(batch.images, device, dataloader_idx)
        return batch._replace(images=moved)

    def predict_step(self, batch: Batch, batch_idx: int) -> list[int]:
        """Predicts and writes one batch; returns its images' places in the list of files."""
        outputs = self.model.predict_step(batch.images, batch_idx)
        for index, output, pixels in zip(batch.indices, outputs, batch.pixels, strict=True):
            self.writer.add(index, output, pixels)
            self.done += 1
        return batch.indices


def _parser(task: type[TaskModule] | None) -> tuple[ArgumentParser, list[str], list[str]]:
    """The command's options, and the names of the task's own: those of `configure_inference` and of `writer`."""
    parser = ArgumentParser(
        prog="involution predict",
        description="Runs a checkpoint over images. The checkpoint holds its task, model, classes and preprocessing; "
        "with --ckpt_path, --help shows the task's own options too.",
    )
    parser.add_argument("--ckpt_path", required=True, type=str, help="a checkpoint of involution fit")
    parser.add_argument("--data.predict_path", required=True, type=str, help="an image, or a folder of images")
    parser.add_argument("--data.batch_size", default=16, type=PositiveInt, help="images per batch")
    workers = "loader workers; by default one per core, none for a single batch"
    parser.add_argument("--data.num_workers", default=None, type=NonNegativeInt | None, help=workers)
    parser.add_argument("--data.on_error", default="raise", choices=["raise", "skip"], help="for unreadable files")
    parser.add_argument("--output", required=True, type=str, help="the folder for the results")
    parser.add_argument("--trainer.accelerator", default="auto", type=str, help="auto, cpu, gpu, ...")
    parser.add_argument("--trainer.precision", default="32-true", type=str, help="32-true, bf16-mixed, ...")
    parser.add_argument("--trainer.enable_progress_bar", default=on_a_terminal(), type=bool)
    if task is None:
        return parser, [], []
    inference_names = parser.add_method_arguments(task, "configure_inference")
    writer_names = parser.add_method_arguments(task, "writer", skip={"folder", "files"})
    return parser, inference_names, writer_names
