"""Layers: involution in 1d, 2d and 3d, its kernel generators, local self-attention; and `diagnose`, for NaN losses."""

from .attention import AttentionGenerator, LocalSelfAttention1d, LocalSelfAttention2d, LocalSelfAttention3d
from .diagnose import Diagnosis, LayerSignal, diagnose
from .generators import (
    BottleneckGenerator,
    ContextGenerator,
    LinearGenerator,
    PositionGenerator,
    SoftmaxGenerator,
    window_softmax,
)
from .involution import Involution1d, Involution2d, Involution3d
from .norms import ChannelL2Norm

__all__ = [
    "AttentionGenerator",
    "BottleneckGenerator",
    "ChannelL2Norm",
    "ContextGenerator",
    "Diagnosis",
    "Involution1d",
    "Involution2d",
    "Involution3d",
    "LayerSignal",
    "LinearGenerator",
    "LocalSelfAttention1d",
    "LocalSelfAttention2d",
    "LocalSelfAttention3d",
    "PositionGenerator",
    "SoftmaxGenerator",
    "diagnose",
    "window_softmax",
]
