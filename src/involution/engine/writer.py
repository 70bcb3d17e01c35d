"""The base class of what writes a task's predictions."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor


class PredictionWriter(ABC):
    """Receives the output for every image of `involution predict`, and writes it.

    Args:
        folder: the folder for the results.
        files: the images.

    Attributes:
        pictures: `add` receives the pixels of the first so many files.
    """

    def __init__(self, folder: Path, files: Sequence[Path]) -> None:
        self.folder, self.files = folder, files
        self.pictures = len(files)

    @abstractmethod
    def add(self, index: int, output: Any, pixels: Tensor | None) -> None:
        """Takes one output, in any order of files.

        Args:
            index: of the image among `files`.
            output: what `predict_step` returned for it.
            pixels: the decoded image, [3, H, W] uint8 on the CPU; None from file `pictures` on.
        """

    @abstractmethod
    def close(self) -> None:
        """Writes what needs all outputs, and prints where the results are; also called after an error."""
