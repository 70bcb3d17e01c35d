"""Layers: involution in one, two and three dimensions, and the kernel generators they take."""

from .generators import BottleneckGenerator, LinearGenerator
from .involution import Involution1d, Involution2d, Involution3d

__all__ = ["BottleneckGenerator", "Involution1d", "Involution2d", "Involution3d", "LinearGenerator"]
