"""Pictures of the kernels that a network generates."""

from .kernels import catch_kernel_maps, draw_kernels, kernel_heat

__all__ = ["catch_kernel_maps", "draw_kernels", "kernel_heat"]
