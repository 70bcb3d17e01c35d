"""Rewriting a user's network: `replace` swaps convolutions for involutions, `optimize` makes it fast for inference."""

from .optimize import optimize
from .replace import Replaced, replace

__all__ = ["Replaced", "optimize", "replace"]
