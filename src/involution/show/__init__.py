"""Pictures: what kernels a network generates, and how its training went."""

from .curves import draw_curves
from .kernels import catch_kernel_maps, draw_kernels, kernel_heat

__all__ = ["catch_kernel_maps", "draw_curves", "draw_kernels", "kernel_heat"]
