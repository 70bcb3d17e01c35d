"""Layers: involution in one, two and three dimensions, the kernel generators they take, and local self-attention."""

from .attention import AttentionGenerator, LocalSelfAttention1d, LocalSelfAttention2d, LocalSelfAttention3d
from .generators import (
    BottleneckGenerator,
    ContextGenerator,
    LinearGenerator,
    PositionGenerator,
    SoftmaxGenerator,
    window_softmax,
)
from .involution import Involution1d, Involution2d, Involution3d
from .replace import Replaced, replace

__all__ = [
    "AttentionGenerator",
    "BottleneckGenerator",
    "ContextGenerator",
    "Involution1d",
    "Involution2d",
    "Involution3d",
    "LinearGenerator",
    "LocalSelfAttention1d",
    "LocalSelfAttention2d",
    "LocalSelfAttention3d",
    "PositionGenerator",
    "Replaced",
    "SoftmaxGenerator",
    "replace",
    "window_softmax",
]
