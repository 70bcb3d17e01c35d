"""The registry of backends: which one serves a call, and why the others do not.

A backend is a module with the functions of `BackendModule` and an entry in `_BACKENDS`.
"""

import os
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from ..arguments import check_call
from ..geometry import Geometry
from ..layer import LayerParts
from . import cpu, reference, triton


class BackendModule(Protocol):
    """The functions of every backend; reference.py defines what each computes.

    They overwrite `out`, `outs` or `results`, which layouts.allocate made, and are never called for an empty result.
    """

    def apply(self, input: Tensor, kernel_map: Tensor, out: Tensor, geometry: Geometry) -> None: ...  # noqa: D102

    def adjoint(self, grad: Tensor, kernel_map: Tensor, out: Tensor, geometry: Geometry) -> None: ...  # noqa: D102

    def correlate(self, grad: Tensor, input: Tensor, out: Tensor, geometry: Geometry) -> None: ...  # noqa: D102

    def fused_layer(self, parts: LayerParts, outs: Sequence[Tensor], geometry: Geometry) -> None: ...  # noqa: D102

    def fused_layer_backward(  # noqa: D102
        self, grad: Tensor, parts: LayerParts, results: Sequence[Tensor], geometry: Geometry
    ) -> None: ...

    def why_not(self, tensor: Tensor | None) -> str:
        """Why the backend cannot run on tensors like this one, or (None) in this process at all; empty if it can."""
        ...

    def fuses(self, tensor: Tensor) -> bool:
        """Whether the fused layer is one kernel on tensors like this one, and so faster than its steps.

        torch.compile traces it, so what depends on the process must be a constant computed at import.
        """
        ...


_BACKENDS: dict[str, BackendModule] = {"cpu": cpu, "triton": triton, "reference": reference}  # in order of preference


def _forced_backend() -> str | None:
    name = os.environ.get("INVOLUTION_BACKEND") or None
    if name is not None and name not in _BACKENDS:
        raise ValueError(f"INVOLUTION_BACKEND must be one of {', '.join(_BACKENDS)}, got {name!r}")
    return name


forced = _forced_backend()  # read at import; None: the tensors decide


class Backend(NamedTuple):
    """One backend's answer for a call.

    `available`: it can run in this process. `serves`: it runs this call (without a call: it runs some calls).
    `reason`: why it does not, empty if it does.
    """

    name: str
    available: bool
    serves: bool
    reason: str


def backends(*call: Any, **options: Any) -> list[Backend]:
    """Every backend, and whether it serves a call or why it does not.

    Args:
        call: nothing, for the state of this process; or the arguments of an involution1d/2d/3d call, input and kernel
            map first.
        options: that call's stride, padding and dilation, if passed by keyword.

    Returns:
        One record (name, available, serves, reason) per backend, in order of preference. For a call exactly one serves.

    Raises:
        TypeError, ValueError: as the call itself.

    Example:
        >>> import torch, involution
        >>> x, k = torch.rand(1, 16, 8, 8), torch.rand(1, 1, 3, 3, 8, 8)
        >>> [b.name for b in involution.backends(x, k, padding=1) if b.serves]
        ['cpu']
    """
    if not call and not options:
        return [_record(name, refusal(name), True) for name in _BACKENDS]
    tensor, _ = check_call(*call, **options)
    chosen = backend_for(tensor)
    return [_record(name, refusal(name, tensor), module is chosen) for name, module in _BACKENDS.items()]


def backend_for(tensor: Tensor) -> BackendModule:
    """The first backend that can run a map on tensors like this one.

    Raises:
        RuntimeError: INVOLUTION_BACKEND forces a backend that cannot.
    """
    for name, module in _BACKENDS.items():
        if not refusal(name, tensor):
            if module is reference and forced is None and tensor.device.type == "cpu":
                _warn_slow(refusal("cpu", tensor))
            return module
    raise RuntimeError(f"INVOLUTION_BACKEND={forced} cannot serve this call: {refusal(str(forced), tensor)}")


def refusal(name: str, tensor: Tensor | None = None) -> str:
    """Why a backend does not run calls on such tensors; empty if it can."""
    if forced not in (None, name):
        return f"INVOLUTION_BACKEND={forced} forbids it"
    reason: str = _BACKENDS[name].why_not(tensor)
    return reason


def fuses(tensor: Tensor) -> bool:
    """Whether a backend runs the fused layer as one kernel on such a tensor; if not, its steps are as fast."""
    return any(module.fuses(tensor) for name, module in _BACKENDS.items() if forced in (None, name))


def why_not_fused(tensor: Tensor) -> str:
    """Why no backend has a fused kernel for such a tensor: the reason of each but the reference, once if all agree."""
    reasons = {
        name: refusal(name, tensor) or f"none for {tensor.dtype}"
        for name, module in _BACKENDS.items()
        if module is not reference
    }
    if len(set(reasons.values())) == 1:
        return next(iter(reasons.values()))
    return "; ".join(f"{name}: {reason}" for name, reason in reasons.items())


def _record(name: str, refusal: str, preferred: bool) -> Backend:
    available = not _BACKENDS[name].why_not(None)
    serves = preferred and not refusal
    return Backend(name, available, serves, "" if serves else refusal or "a preferred backend serves")


_warned = False


def _warn_slow(reason: str) -> None:
    global _warned
    if not _warned:
        _warned = True
        message = "involution runs on its reference path, which is several times slower than its CPU kernels: "
        warnings.warn(message + reason, RuntimeWarning, stacklevel=1)  # torch's dispatcher hides the caller's line
