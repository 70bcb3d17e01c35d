"""Pictures: the kernels that a network generates, and its training curves."""

from .curves import draw_curves
from .kernels import catch_kernel_maps, draw_kernels, kernel_heat

__all__ = ["catch_kernel_maps", "draw_curves", "draw_kernels", "kernel_heat"]
