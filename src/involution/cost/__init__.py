"""Parameters and multiply-adds of a network."""

from .count import Cost, Operation, cost, multiply_adds, parameters

__all__ = ["Cost", "Operation", "cost", "multiply_adds", "parameters"]
