"""Class probabilities of an image: whole or by a sliding window, at several scales, with mirroring."""

from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import NamedTuple

from torch import Tensor
from torch.nn import functional as F

Network = Callable[[Tensor], Tensor]  # [1, 3, h, w] -> logits [1, C, h, w]


class Inference(NamedTuple):
    """Inference settings.

    `window` is height and width of a sliding window, or None for the whole image at once; `stride` is its step. The
    probabilities for all `scales` and, with `flip`, for the mirrored image are averaged.
    """

    window: tuple[int, int] | None = None
    stride: tuple[int, int] | None = None
    scales: tuple[float, ...] = (1.0,)
    flip: bool = False

    def check(self) -> None:
        """Checks the values.

        Raises:
            ValueError: a value does not fit.
        """
        if not self.scales or min(self.scales) <= 0:
            raise ValueError(f"scales must be positive factors, got {self.scales!r}")
        if self.window is None:
            if self.stride is not None:
                raise ValueError(f"window_stride needs a window, got {self.stride!r} without one")
            return
        if min(self.window) < 1:
            raise ValueError(f"window must be at least 1 along each axis, got {self.window!r}")
        if self.stride is not None and any(not 1 <= s <= w for s, w in zip(self.stride, self.window, strict=True)):
            raise ValueError(f"window_stride must be from 1 to the window's {self.window!r}, got {self.stride!r}")

    def probabilities(self, network: Network, image: Tensor, size: tuple[int, int]) -> Tensor:
        """[3, h, w] -> [C, *size], in float32.

        Args:
            network: returns logits of its input's size.
            image: preprocessed.
            size: height and width of the result.
        """
        total: Tensor | None = None
        for scaled in self._views(image[None]):
            for mirrored in (False, True) if self.flip else (False,):
                logits = self._logits(network, scaled.flip(-1) if mirrored else scaled).float()
                logits = logits.flip(-1) if mirrored else logits
                found = F.interpolate(logits, size=size, mode="bilinear", align_corners=False).softmax(1)
                total = found if total is None else total + found
        assert total is not None
        return total[0] / (len(self.scales) * (1 + self.flip))

    def _views(self, image: Tensor) -> Iterator[Tensor]:
        for scale in self.scales:
            if scale == 1:
                yield image
                continue
            size = [max(1, round(scale * side)) for side in image.shape[-2:]]
            yield F.interpolate(image, size=size, mode="bilinear", align_corners=False, antialias=True)

    def _logits(self, network: Network, image: Tensor) -> Tensor:
        if self.window is None:
            return network(image)
        return sliding_window(network, image, self.window, self.stride or self.window)


def sliding_window(network: Network, image: Tensor, window: Sequence[int], stride: Sequence[int]) -> Tensor:
    """Logits by a sliding window, averaged where windows overlap.

    Args:
        network: [1, 3, h, w] -> [1, C, h, w].
        image: [1, 3, H, W]; an axis shorter than the window has one window, of the axis's length.
        window: height and width.
        stride: step along each axis; the last window is aligned with the image's end.

    Returns:
        [1, C, H, W].
    """
    total: Tensor | None = None
    count = image.new_zeros(image.shape[-2:])
    starts = [_starts(*axis) for axis in zip(image.shape[-2:], window, stride, strict=True)]
    for top, left in product(*starts):
        part = (..., slice(top, top + window[0]), slice(left, left + window[1]))
        found = network(image[part])
        if total is None:
            total = found.new_zeros((*found.shape[:2], *image.shape[-2:]))
        total[part] += found
        count[part] += 1
    assert total is not None
    return total / count


def _starts(length: int, window: int, stride: int) -> list[int]:
    last = max(0, length - window)
    return [*range(0, last, stride), last]
