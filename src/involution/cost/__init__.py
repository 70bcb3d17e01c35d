"""What a network costs: parameters and multiply-adds."""

from .count import Cost, Operation, cost, multiply_adds, parameters

__all__ = ["Cost", "Operation", "cost", "multiply_adds", "parameters"]
