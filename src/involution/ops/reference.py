"""The three maps in plain PyTorch, as shifted multiply-adds: the oracle, and the path for devices with no kernel.

Every backend has the three functions and `why_not`. `out` comes from geometry.allocate and is overwritten. Half
precision accumulates in float32. Taps outside the input are never touched, so an Inf or NaN weight there has no effect.
"""

import torch
from torch import Tensor

from .geometry import Geometry


def apply(input: Tensor, kernel_map: Tensor, out: Tensor, geometry: Geometry) -> None:
    """y[n, c, o] = sum over u of k[n, g(c), u, o] * x[n, c, o*stride + u*dilation - padding]."""
    x, k = _grouped(input, geometry), _widened(kernel_map)
    y = torch.zeros_like(_grouped(out, geometry), dtype=x.dtype)
    for at_map, at_output, at_input in geometry.taps():
        y[at_output].addcmul_(k[at_map].unsqueeze(2), x[at_input])
    _grouped_view(out, geometry).copy_(y)


def adjoint(grad: Tensor, kernel_map: Tensor, out: Tensor, geometry: Geometry) -> None:
    """dx, the gradient with respect to x: every product of `apply` goes back to where its x came from."""
    g, k = _grouped(grad, geometry), _widened(kernel_map)
    dx = torch.zeros_like(_grouped(out, geometry), dtype=g.dtype)
    for at_map, at_output, at_input in geometry.taps():
        dx[at_input].addcmul_(k[at_map].unsqueeze(2), g[at_output])
    _grouped_view(out, geometry).copy_(dx)


def correlate(grad: Tensor, input: Tensor, out: Tensor, geometry: Geometry) -> None:
    """dk, the gradient with respect to k: for every tap and position, the dot product over a group's channels."""
    g, x = _grouped(grad, geometry), _grouped(input, geometry)
    out.zero_()
    for at_map, at_output, at_input in geometry.taps():
        out[at_map] = (g[at_output] * x[at_input]).sum(2)


def why_not(tensor: Tensor | None) -> str:
    """Why this backend cannot run on tensors like this one, or (None) at all: it always can."""
    return ""


def _grouped_view(image: Tensor, geometry: Geometry) -> Tensor:
    """[N, C, *S] -> [N, G, C/G, *S], sharing memory."""
    return image.unflatten(1, (geometry.groups, geometry.channels // geometry.groups))


def _grouped(image: Tensor, geometry: Geometry) -> Tensor:
    return _grouped_view(_widened(image), geometry)


def _widened(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
