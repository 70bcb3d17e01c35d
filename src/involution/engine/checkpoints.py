"""Checkpoint files: written atomically, the newest one found, loaded into the module class that they name."""

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import entry_points
from pathlib import Path
from typing import IO, Any, cast

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from ..zoo.checkpoints import SOURCES
from .atomic import atomic_write
from .module import TaskModule


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint atomically, so that no partial file is ever visible: see `atomic_write`.

    A failed write raises its error and leaves the previous file unchanged.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Writes, flushes to disk, renames."""
        if "://" in str(path):  # a remote file: left to Lightning
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        writer = None
        try:
            with atomic_write(Path(path)) as part, part.open("wb") as stream:
                writer = _Writer(stream)
                torch.save(checkpoint, cast(IO[bytes], writer))
        except (OSError, RuntimeError) as error:
            # torch's archive writer may hide the stream's error: "unexpected pos 64 vs 0"
            cause = writer.error if writer and writer.error else error
            if not isinstance(cause, OSError):
                raise
            reason = cause.strerror or str(cause)
            raise OSError(cause.errno, f"{reason}, so the checkpoint is not written", str(path)) from error


class _Writer:
    """A stream that remembers the first error of writing."""

    def __init__(self, stream: IO[bytes]) -> None:
        self.stream = stream
        self.error: OSError | None = None

    def write(self, content: Any) -> int:
        """Writes bytes."""
        try:
            return self.stream.write(content)
        except OSError as error:
            self.error = self.error or error
            raise

    def flush(self) -> None:
        """Passes what is buffered on."""
        self.stream.flush()


def last_checkpoint(folder: Path) -> Path:
    """The newest last.ckpt of the runs in a folder: in version_N/checkpoints or, without a logger, in checkpoints.

    Raises:
        FileNotFoundError: there is none.
    """
    found = [path for place in ("version_*/checkpoints", "checkpoints") for path in folder.glob(f"{place}/last.ckpt")]
    found.sort(key=lambda path: path.stat().st_mtime)
    if not found:
        raise FileNotFoundError(f"ckpt_path last: no version_*/checkpoints/last.ckpt in {folder}")
    return found[-1]


def monitored(trainer: Trainer) -> list[str]:
    """The metrics that checkpoints are selected by."""
    selecting = [one for one in trainer.checkpoint_callbacks if isinstance(one, ModelCheckpoint)]
    return [one.monitor for one in selecting if one.monitor]


@contextmanager
def content_of(checkpoint: Path, argument: str) -> Iterator[dict[str, Any]]:
    """Reads a checkpoint, its tensors only when they are used.

    Args:
        checkpoint: of `involution fit`.
        argument: the option's name in errors.

    Raises:
        ValueError: the file is no checkpoint, or asks for code; or the block fails to find what it seeks in there.
    """
    try:
        yield torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises errors of many kinds for other files
        raise ValueError(f"{argument} must be a checkpoint of involution fit, got {checkpoint}: {error!r}") from error


def module_class(checkpoint: Path, argument: str = "ckpt_path") -> type[TaskModule]:
    """The Lightning module's class that a checkpoint names.

    Args:
        checkpoint: of `involution fit`.
        argument: the option's name in errors.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no checkpoint of `involution fit`, or the class that it names cannot be imported.
    """
    if not checkpoint.is_file():
        raise FileNotFoundError(f"{argument} must be a checkpoint, got {checkpoint}, which is no file")
    with content_of(checkpoint, argument) as content:
        stored = content["involution"]
    return named_class(stored, checkpoint, argument)


def load_module(checkpoint: Path, argument: str = "ckpt_path") -> TaskModule:
    """The Lightning module of a checkpoint, on the CPU; for the arguments and errors see `module_class`.

    Its hyperparameters make the network without other files or downloads, whatever the checkpoint says.
    """
    kind = module_class(checkpoint, argument)
    with content_of(checkpoint, argument) as content:
        given = without_sources(content.get("hyper_parameters", {}))
    return kind.load_from_checkpoint(checkpoint, map_location="cpu", weights_only=True, **given)


def without_sources(hyperparameters: dict[str, Any]) -> dict[str, Any]:
    """The hyperparameters that name weights other than the checkpoint's own, without those."""
    found: dict[str, Any] = {}
    if hyperparameters.get("backbone_weights") is not None:
        found["backbone_weights"] = None
    for name in ("model_kwargs", "backbone_kwargs"):
        options = hyperparameters.get(name)
        if isinstance(options, dict) and set(options) & set(SOURCES):
            found[name] = {option: value for option, value in options.items() if option not in SOURCES}
    return found


def named_class(stored: dict[str, Any], checkpoint: Path, argument: str) -> type[TaskModule]:
    """The class that a checkpoint's entry `involution` names; for the arguments and errors see `module_class`."""
    if not isinstance(stored, dict) or "module" not in stored:
        raise ValueError(f"{argument} must name its module class under involution.module, got {checkpoint} without it")
    name = str(stored["module"])
    package, _, kind = name.rpartition(".")
    check_importable(name, f"{argument} {checkpoint}")
    try:
        found = getattr(importlib.import_module(package), kind)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{argument} must name a module class that is installed here, got {name!r} in {checkpoint}: {error}"
        ) from error
    if not (isinstance(found, type) and issubclass(found, TaskModule)):
        raise ValueError(f"{argument} must name a subclass of TaskModule, got {name!r} in {checkpoint}")
    return found


TASK_PACKAGES = "involution.tasks"  # the group of entry points with which other packages declare their tasks


def check_importable(name: str, source: str) -> None:
    """Raises unless the class that a file names may be imported: importing a module runs its code.

    It may if its module is one of ours, is imported already, or belongs to an installed package that declares tasks.

    Args:
        name: module and class.
        source: the file's name in errors.

    Raises:
        ValueError: it may not.
    """
    module = name.rpartition(".")[0]
    declared = {entry.module.partition(".")[0] for entry in entry_points(group=TASK_PACKAGES)}
    if module not in sys.modules and module.partition(".")[0] not in {"involution", *declared}:
        raise ValueError(
            f"{source} names the class {name!r}, which is not imported: it must be of involution, of a package with an "
            f"entry point in the group {TASK_PACKAGES}, or imported before"
        )
