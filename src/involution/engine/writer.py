"""The base class of the writers of predictions, one per task."""

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
        pictures: the number of files, from the first on, for which `add` receives pixels; by default all.
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
