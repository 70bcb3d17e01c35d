"""Involution (Li et al., CVPR 2021): the operator, its layers, and networks built from them.

Attributes load on first access (PEP 562), so that ``involution --help`` does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .allocator import keep_freed_memory
    from .nn.involution import Involution1d, Involution2d, Involution3d
    from .ops.backends.selection import backends
    from .ops.functional import involution1d, involution2d, involution3d
    from .rewrite.optimize import optimize

    __version__: str

_MODULES = {
    "involution1d": "ops.functional",
    "involution2d": "ops.functional",
    "involution3d": "ops.functional",
    "backends": "ops.backends.selection",
    "Involution1d": "nn.involution",
    "Involution2d": "nn.involution",
    "Involution3d": "nn.involution",
    "optimize": "rewrite.optimize",
    "keep_freed_memory": "allocator",
}

__all__ = [
    "Involution1d",
    "Involution2d",
    "Involution3d",
    "__version__",
    "backends",
    "involution1d",
    "involution2d",
    "involution3d",
    "keep_freed_memory",
    "optimize",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("involution")
    if name not in _MODULES:
        raise AttributeError(f"module 'involution' has no attribute {name!r}")
    import_module("involution.ops")  # first: its error names a torch that is missing or too old
    value = getattr(import_module(f"involution.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
