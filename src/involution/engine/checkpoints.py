"""Checkpoint files: written atomically, and the newest one found."""

import os
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes checkpoints beside their place and moves them there when they are on disk: never half of one.

    A write that fails raises its error and leaves what was there before.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Writes, flushes to the disk, renames."""
        if "://" in str(path):  # not a file of this machine: as Lightning does it
            return super().save_checkpoint(checkpoint, path, storage_options)
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f".{target.name}.part")
        try:
            with part.open("wb") as stream:
                torch.save(checkpoint, stream)
                stream.flush()
                os.fsync(stream.fileno())
            part.replace(target)
        finally:
            part.unlink(missing_ok=True)
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the rename too
        finally:
            os.close(folder)
        return None


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
