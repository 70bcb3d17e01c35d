"""The targets of a batch."""

from collections.abc import Iterator
from typing import Any

from lightning.fabric.utilities import move_data_to_device


class Targets:
    """The targets of a batch, one dictionary per image, whose tensors keep their dtypes.

    Lightning's 16-bit precisions convert every floating-point tensor in a batch's lists and dictionaries, and in
    bfloat16 the coordinate 1001 is 1000. They do not convert the tensors in this class.
    """

    def __init__(self, of_images: list[dict[str, Any]]) -> None:
        self._of_images = of_images

    def __len__(self) -> int:
        return len(self._of_images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._of_images[index]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self._of_images)

    def to(self, device: Any, **options: Any) -> "Targets":
        """The same targets on another device."""
        return Targets(move_data_to_device(self._of_images, device))

    def pin_memory(self) -> "Targets":
        """The same targets in pinned memory; called by DataLoader."""
        return Targets(
            [
                {name: value.pin_memory() if hasattr(value, "pin_memory") else value for name, value in one.items()}
                for one in self._of_images
            ]
        )
