"""Changes to a network: `replace` makes its convolutions involutions, `optimize` makes it fast for inference."""

from .optimize import optimize
from .replace import Replaced, replace

__all__ = ["Replaced", "optimize", "replace"]
