"""What a network costs: parameters and multiply-adds."""

from .count import multiply_adds, parameters

__all__ = ["multiply_adds", "parameters"]
