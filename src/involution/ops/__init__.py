"""The operator: three maps, their backends, and the functions that users call.

Importing this registers torch.ops.involution.apply, .adjoint, .correlate, .fused, .fused_backward and .bottleneck;
loading an exported program needs that.
"""

from . import fused as fused
from . import registration as registration
