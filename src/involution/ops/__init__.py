"""The operator: three maps, their backends, and the functions that users call.

Importing this registers torch.ops.involution.apply, .adjoint and .correlate; loading an exported program needs that.
"""

from . import registration as registration
