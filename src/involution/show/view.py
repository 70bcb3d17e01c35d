"""Geometry: from the pixels of an image to a network's input, to the positions of a layer, and back.

Coordinates are (x, y), and pixel i covers the interval i..i+1. Position p of a layer whose input is `jump` times
smaller than the network's is centred on the centre of pixel p * jump of that input: strided layers with odd kernels and
"same" padding sample every jump-th pixel.
"""

import math
from typing import Any, NamedTuple

from PIL import Image
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import v2

Box = tuple[float, float, float, float]  # left, top, right, bottom


class View(NamedTuple):
    """The part of an image that a network receives: input = image * scale + offset, per axis.

    `size` is width and height of the network's input, without padding.
    """

    scale: tuple[float, float]
    offset: tuple[float, float]
    size: tuple[int, int]

    def to_input(self, x: float, y: float) -> tuple[float, float]:
        """A point of the image, in the network's input."""
        return x * self.scale[0] + self.offset[0], y * self.scale[1] + self.offset[1]

    def to_image(self, box: Box) -> Box:
        """A box of the network's input, in the image."""
        (sx, sy), (ox, oy) = self.scale, self.offset
        left, top, right, bottom = box
        return (left - ox) / sx, (top - oy) / sy, (right - ox) / sx, (bottom - oy) / sy


def preprocess(transform: Any, image: Image.Image) -> tuple[Tensor, View]:
    """Runs the steps of a torchvision Compose (of either version) on an image and follows resizes and centre crops.

    Returns:
        The network's input [3, h, w], and the view.

    Raises:
        ValueError: another step changes the image's size.
    """
    value: Any = image
    size, scale, offset = image.size, (1.0, 1.0), (0.0, 0.0)
    for step in transform.transforms:
        value = step(value)
        height, width = v2.functional.get_size(value)
        after = (width, height)
        if isinstance(step, transforms.Resize | v2.Resize):
            ratio = tuple(new / old for new, old in zip(after, size, strict=True))
            scale = (scale[0] * ratio[0], scale[1] * ratio[1])
            offset = (offset[0] * ratio[0], offset[1] * ratio[1])
        elif isinstance(step, transforms.CenterCrop | v2.CenterCrop):
            offset = (offset[0] - _cropped(size[0], width), offset[1] - _cropped(size[1], height))
        elif after != size:
            raise ValueError(f"preprocessing must consist of resizes and centre crops, got {type(step).__name__}")
        size = after
    return value, View(scale, offset, size)


def _cropped(length: int, kept: int) -> int:
    """The pixels that torchvision's centre crop removes at the left or top; negative where it pads."""
    return round((length - kept) / 2) if length >= kept else -((kept - length) // 2)


class Grid(NamedTuple):
    """The positions of a layer in the network's input, each value per axis (x, y)."""

    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    jump: tuple[float, float]
    output_size: tuple[int, int]

    @classmethod
    def of(
        cls, layer: Any, network_size: tuple[int, int], input_size: tuple[int, int], output: tuple[int, int]
    ) -> "Grid":
        """Of a layer with kernel_size, stride and dilation; the sizes are heights and widths."""
        jumps = [jump(whole, part) for whole, part in zip(network_size, input_size, strict=True)]
        kernel, stride, dilation = layer.kernel_size, layer.stride, layer.dilation
        return cls(
            *((kernel[1], kernel[0]), (stride[1], stride[0]), (dilation[1], dilation[0])),
            jump=(jumps[1], jumps[0]),
            output_size=(output[1], output[0]),
        )

    def position(self, x: float, y: float) -> tuple[int, int]:
        """The output position (column, row) whose centre is nearest to a point of the network's input."""
        column, row = (
            min(max(0, round((value - 0.5) / (self.jump[axis] * self.stride[axis]))), self.output_size[axis] - 1)
            for axis, value in enumerate((x, y))
        )
        return column, row

    def footprint(self, column: int, row: int) -> Box:
        """The box of the K x K taps at an output position; a tap's cell is as wide as the distance between taps."""
        starts, ends = [], []
        for axis, place in enumerate((column, row)):
            size, step = self.kernel_size[axis], self.dilation[axis] * self.jump[axis]
            left = self.dilation[axis] * (size - 1) // 2  # the layers' left padding
            first = 0.5 + (place * self.stride[axis] - left) * self.jump[axis]
            starts.append(first - step / 2)
            ends.append(first + (size - 0.5) * step)
        return starts[0], starts[1], ends[0], ends[1]

    def extent(self) -> Box:
        """The box of all output positions, each as wide as the distance between two."""
        steps = [jump * stride for jump, stride in zip(self.jump, self.stride, strict=True)]
        left, top = (0.5 - step / 2 for step in steps)
        return left, top, left + steps[0] * self.output_size[0], top + steps[1] * self.output_size[1]


def jump(whole: int, part: int) -> float:
    """The distance, in positions of a longer axis, between neighbours of a shorter one.

    A power of two where a chain of stride-2 layers, each with ceil(size / 2) outputs, has made `part` of `whole`.
    """
    power = 2.0 ** math.ceil(math.log2(whole / part))
    return power if math.ceil(whole / power) == part else whole / part
