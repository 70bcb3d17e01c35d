"""The operator: three maps, their backends, and the functions that users call.

Importing this package registers torch.ops.involution.apply, .adjoint, .correlate, .fused_layer, .fused_layer_backward
and .fused_bottleneck; a process that loads an exported program has to import it.
"""

import os

OLDEST_TORCH = (2, 10)  # as in pyproject.toml

try:
    import torch
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    missing = "involution needs torch, not installed here: pip install torch (for the CPU alone: see docs/install.md)"
    raise ModuleNotFoundError(missing, name="torch") from error
if tuple(int(part) for part in torch.__version__.split(".")[:2]) < OLDEST_TORCH:
    oldest = ".".join(map(str, OLDEST_TORCH))
    raise ImportError(f"involution needs torch {oldest} or later, got {torch.__version__}", name="torch")

if os.environ.get("INVOLUTION_BACKEND") == "triton" and not torch.accelerator.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # run its kernels on CPU tensors; Triton reads this at import

from . import fused as fused  # noqa: E402
from . import registration as registration  # noqa: E402
