"""Checkpoint files: written atomically, the newest one found, loaded into the module class that they name."""

import importlib
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

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
        with atomic_write(Path(path)) as part, part.open("wb") as stream:
            torch.save(checkpoint, stream)


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
    try:
        content = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
        stored = content["involution"]
    except Exception as error:  # torch raises errors of many kinds for other files
        raise ValueError(f"{argument} must be a checkpoint of involution fit, got {checkpoint}: {error!r}") from error
    return named_class(stored, checkpoint, argument)


def load_module(checkpoint: Path, argument: str = "ckpt_path") -> TaskModule:
    """The Lightning module of a checkpoint, on the CPU; for the arguments and errors see `module_class`."""
    kind = module_class(checkpoint, argument)
    return kind.load_from_checkpoint(checkpoint, map_location="cpu", weights_only=True)


def named_class(stored: dict[str, Any], checkpoint: Path, argument: str) -> type[TaskModule]:
    """The class that a checkpoint's entry `involution` names; for the arguments and errors see `module_class`."""
    if "module" not in stored:
        raise ValueError(f"{argument} must name its module class under involution.module, got {checkpoint} without it")
    name = str(stored["module"])
    package, _, kind = name.rpartition(".")
    try:
        found = getattr(importlib.import_module(package), kind)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{argument} must name a module class that is installed here, got {name!r} in {checkpoint}: {error}"
        ) from error
    if not (isinstance(found, type) and issubclass(found, TaskModule)):
        raise ValueError(f"{argument} must name a subclass of TaskModule, got {name!r} in {checkpoint}")
    return found
