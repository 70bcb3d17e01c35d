"""The operator: three maps, their backends, and the functions that users call.

Importing this package registers torch.ops.involution.apply, .adjoint, .correlate, .fused_layer, .fused_layer_backward
and .fused_bottleneck; a process that loads an exported program has to import it.
"""

import os

import torch

if os.environ.get("INVOLUTION_BACKEND") == "triton" and not torch.accelerator.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # run its kernels on CPU tensors; Triton reads this at import

from . import fused as fused
from . import registration as registration
