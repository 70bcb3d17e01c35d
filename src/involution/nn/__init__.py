"""Layers: involution in one, two and three dimensions, the kernel generators they take, attention, a diagnosis."""

from .attention import AttentionGenerator, LocalSelfAttention1d, LocalSelfAttention2d, LocalSelfAttention3d
from .diagnose import Diagnosis, LayerSignal, diagnose
from .generators import (
    BottleneckGenerator,
    ChannelRMSNorm,
    ContextGenerator,
    LinearGenerator,
    PositionGenerator,
    SoftmaxGenerator,
    window_softmax,
)
from .involution import Involution1d, Involution2d, Involution3d

__all__ = [
    "AttentionGenerator",
    "BottleneckGenerator",
    "ChannelRMSNorm",
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
