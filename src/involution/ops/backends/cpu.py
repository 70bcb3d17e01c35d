"""The CPU backend: calls the C++ kernels of csrc/ through their C ABI.

ctypes releases the GIL during a call. Every call passes torch's thread count.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import product

import torch
from torch import Tensor

from ..geometry import MAPS, Geometry
from ..layer import LayerParts, pack
from ..layouts import is_channels_last, is_stored_channels_last, memory_order
from .cpu_library import SUFFIX, TENSORS, CFusedLayer, CGeometry, function, why_not_loaded

_ROLES = {map.name: (*map.takes, map.makes) for map in MAPS}
_16_BIT = (torch.float16, torch.bfloat16)
_MAX_16_BIT_TAPS, _MAX_16_BIT_WIDTH = 512, 16  # as csrc/involution.h has them
_WEIGHTS = {name for name in TENSORS if name.endswith("weight")}
_IMAGES = {"input", "hidden", "shortcut"}


def apply(input: Tensor, kernel_map: Tensor, out: Tensor, geometry: Geometry) -> None:
    """See reference.apply."""
    _call("apply", (input, kernel_map, out), geometry)


def adjoint(grad: Tensor, kernel_map: Tensor, out: Tensor, geometry: Geometry) -> None:
    """See reference.adjoint."""
    _call("adjoint", (grad, kernel_map, out), geometry)


def correlate(grad: Tensor, input: Tensor, out: Tensor, geometry: Geometry) -> None:
    """See reference.correlate."""
    _call("correlate", (grad, input, out), geometry)


_LARGE_KERNEL, _WIDE_GROUP = 25, 16  # from which on contiguous tensors are faster converted to channels last, and back


def _call(name: str, tensors: tuple[Tensor, Tensor, Tensor], geometry: Geometry) -> None:
    """Brings both operands into the layout of the first, or a faster one, runs the kernel, and fills `out` (last)."""
    out = tensors[2]
    taps, width = math.prod(geometry.kernel), geometry.channels // geometry.groups
    large = name != "correlate" and taps >= _LARGE_KERNEL and width >= _WIDE_GROUP
    channels_last = large or is_channels_last(tensors[0])
    in_16_bits = channels_last and taps <= _MAX_16_BIT_TAPS
    if name == "correlate":
        in_16_bits = in_16_bits and width <= _MAX_16_BIT_WIDTH
    dtype = torch.float32 if out.dtype in _16_BIT and not in_16_bits else out.dtype
    result_dtype = torch.float32 if dtype in _16_BIT and name == "adjoint" else dtype
    if channels_last:
        dims = len(geometry.input)
        tensors = tuple(  # type: ignore[assignment]
            t.permute(memory_order(role, dims)) for role, t in zip(_ROLES[name], tensors, strict=True)
        )
    first, second, result = tensors
    first, second = first.to(dtype).contiguous(), second.to(dtype).contiguous()
    if out.dtype != result_dtype or not result.is_contiguous():
        result = torch.empty(result.shape, dtype=result_dtype)
    function(f"involution_{name}_{SUFFIX[dtype]}")(
        _c_geometry(geometry, channels_last, torch.get_num_threads()),
        first.data_ptr(),
        second.data_ptr(),
        result.data_ptr(),
    )
    if result is not tensors[2]:
        tensors[2].copy_(result)


def fused_layer(parts: LayerParts, outs: Sequence[Tensor], geometry: Geometry) -> None:
    """See reference.fused_layer."""
    dtype = _layer_dtype(outs[0].dtype)
    tensors = {
        name: _as_kernel_input(name, tensor, dtype)
        for name, tensor in zip(TENSORS, parts.tensors(), strict=True)
        if tensor is not None
    }
    results = [_as_kernel_output(out, dtype) for out in outs]
    c_geometry = _c_geometry(geometry, True, torch.get_num_threads())
    c_layer = CFusedLayer(
        **{name: tensor.data_ptr() for name, tensor in tensors.items()},
        output=results[0].data_ptr(),
        next_reduce_output=results[-1].data_ptr(),
        hidden_channels=parts.span_weight.shape[1],
        expand_channels=outs[0].shape[1],
        next_reduce_channels=outs[-1].shape[1],
        relu=parts.relu,
        expand_relu=parts.expand_relu,
        rms_eps=parts.rms_eps,
    )
    elements = function("involution_fused_layer_workspace")(c_geometry, c_layer) * c_geometry.threads
    workspace = torch.empty(elements, dtype=dtype)
    c_layer.workspace = workspace.data_ptr()
    function(f"involution_fused_layer_{SUFFIX[dtype]}")(c_geometry, c_layer)
    _copy_back(outs, results)


def _layer_dtype(dtype: torch.dtype) -> torch.dtype:
    """The fused layer's dtype for tensors of `dtype`: float32 for 16-bit tensors, as it stores no kernel map."""
    return torch.float32 if dtype in _16_BIT else dtype


def _as_kernel_input(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Images as [N, *S, C], weights packed, in the kernels' dtype; the tensor itself where it already is."""
    tensor = tensor.to(dtype) if tensor.dtype != dtype else tensor  # the check is faster than a `to` without effect
    if name in _WEIGHTS:
        return pack(tensor) if tensor.dim() == 2 else tensor.contiguous()
    if name in _IMAGES:
        return tensor if is_stored_channels_last(tensor) else tensor.movedim(1, -1).contiguous()
    return tensor.contiguous()


def _as_kernel_output(out: Tensor, dtype: torch.dtype) -> Tensor:
    """`out` itself if the kernels can write it, else an empty tensor of its shape that they can."""
    if out.dtype == dtype and (is_stored_channels_last(out) if out.dim() > 2 else out.is_contiguous()):
        return out
    if out.dim() <= 2:
        return torch.empty(out.shape, dtype=dtype)
    return torch.empty(out.movedim(1, -1).shape, dtype=dtype).movedim(-1, 1)


def _copy_back(outs: Sequence[Tensor], results: Sequence[Tensor]) -> None:
    """Copies results into the outputs that the kernels could not write themselves."""
    for out, result in zip(outs, results, strict=True):
        if result is not out:
            out.copy_(result)


def fused_layer_backward(grad: Tensor, parts: LayerParts, results: Sequence[Tensor], geometry: Geometry) -> None:
    """See reference.fused_layer_backward.

    The kernel map is recomputed for some positions at a time, and then overwritten by its gradient.
    """
    dtype = _layer_dtype(grad.dtype)
    assert parts.hidden is not None
    x, g, h = (image.to(dtype).movedim(1, -1).contiguous() for image in (parts.input, grad, parts.hidden))
    span, offset = parts.span_weight.to(dtype), None if parts.span_bias is None else parts.span_bias.to(dtype)
    computed = [_as_kernel_output(result, dtype) for result in results]
    dx, dh = (image.movedim(1, -1) for image in computed[:2])
    dweight, dbias = computed[2:]
    for total in (dx, dweight, dbias):
        total.zero_()
    row = math.prod(geometry.output[1:]) * len(span)  # elements of the kernel map per row of the first spatial axis
    images = max(1, _MAP_AT_ONCE // (row * geometry.output[0]))
    rows = geometry.output[0] if images > 1 else max(1, _MAP_AT_ONCE // row)
    threads = torch.get_num_threads()
    for n, r in product(range(0, geometry.batch, images), range(0, geometry.output[0], rows)):
        at = (slice(n, n + images), slice(r, r + rows))
        features = h[at].flatten(0, -2)
        kernels = torch.nn.functional.linear(features, span, offset)
        part = geometry._replace(
            batch=h[at].shape[0],
            output=(h[at].shape[1], *geometry.output[1:]),
            padding=(geometry.padding[0] - r * geometry.stride[0], *geometry.padding[1:]),
        )
        pointers = g[at].data_ptr(), kernels.data_ptr(), x[n].data_ptr(), dx[n].data_ptr()
        suffix = SUFFIX[dtype]
        function(f"involution_adjoint_{suffix}")(
            _c_geometry(part, True, threads, True), pointers[0], pointers[1], pointers[3]
        )
        function(f"involution_correlate_{suffix}")(
            _c_geometry(part, True, threads), pointers[0], pointers[2], pointers[1]
        )
        dh[at] = (kernels @ span).view(dh[at].shape)
        dweight += _transposed_product(kernels, features)
        dbias += kernels.sum(0)
    _copy_back(results, computed)


def _transposed_product(left: Tensor, right: Tensor) -> Tensor:
    """left.T @ right for [P, M] and [P, R], bit-identical for every number of threads.

    A single matrix product may split the reduction over P among its threads; a batched one gives them whole matrices.
    """
    length = -(-len(left) // _REDUCTION_PARTS)
    missing = length * _REDUCTION_PARTS - len(left)
    first, second = (torch.nn.functional.pad(t, (0, 0, 0, missing)).unflatten(0, (-1, length)) for t in (left, right))
    return torch.bmm(first.transpose(1, 2), second).sum(0)


_REDUCTION_PARTS = 8  # at least the threads of most machines; not their number, on which the result would depend
_MAP_AT_ONCE = 1 << 20  # elements of the kernel map in a step of the backward pass: fits the last-level cache


@lru_cache(maxsize=1024)
def _c_geometry(geometry: Geometry, channels_last: bool, threads: int, accumulate: bool = False) -> CGeometry:
    missing = 3 - len(geometry.input)
    ones, zeros = (1,) * missing, (0,) * missing
    return CGeometry(
        batch=geometry.batch,
        channels=geometry.channels,
        groups=geometry.groups,
        input=(*ones, *geometry.input),
        kernel=(*ones, *geometry.kernel),
        output=(*ones, *geometry.output),
        stride=(*ones, *geometry.stride),
        padding=(*zeros, *geometry.padding),
        dilation=(*ones, *geometry.dilation),
        channels_last=channels_last,
        threads=threads,
        accumulate=accumulate,
    )


def why_not(tensor: Tensor | None) -> str:
    """Why the kernels cannot run on tensors like this one, or (None) at all; empty if they can."""
    reason = why_not_loaded()
    if not reason and tensor is not None and tensor.device.type != "cpu":
        return f"the tensors are on {tensor.device}"
    return reason


def fuses(tensor: Tensor) -> bool:
    """See selection.BackendModule: in the dtypes of the kernels; 16-bit tensors would be converted on the way."""
    return tensor.device.type == "cpu" and tensor.dtype in (torch.float32, torch.float64) and _AVAILABLE


_AVAILABLE = not why_not(None)  # evaluated at import: torch.compile cannot trace the loading of the library
