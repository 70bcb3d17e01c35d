"""Which backend serves a call and, when asked, why the others do not.

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
    """What every backend has; reference.py says what each function computes.

    `out` comes from layouts.allocate and is overwritten. No function is called for an empty result.
    """

    def apply(self, input: Tensor, kernel_map: Tensor, out: Tensor, geometry: Geometry) -> None: ...  # noqa: D102

    def adjoint(self, grad: Tensor, kernel_map: Tensor, out: Tensor, geometry: Geometry) -> None: ...  # noqa: D102

    def correlate(self, grad: Tensor, input: Tensor, out: Tensor, geometry: Geometry) -> None: ...  # noqa: D102

    def fused_layer(self, parts: LayerParts, outs: Sequence[Tensor], geometry: Geometry) -> None: ...  # noqa: D102

    def fused_layer_backward(  # noqa: D102
        self, grad: Tensor, parts: LayerParts, results: Sequence[Tensor], geometry: Geometry
    ) -> None: ...

    def why_not(self, tensor: Tensor | None) -> str:
        """Why the backend cannot run on tensors like this one, or (None) in this process; empty if it can."""
        ...

    def fuses(self, tensor: Tensor) -> bool:
        """Whether the fused layer is one kernel on tensors like this one, and so faster than its steps.

        Traced by torch.compile: what the process can do must have been asked when the module was imported.
        """
        ...


_BACKENDS: dict[str, BackendModule] = {"cpu": cpu, "triton": triton, "reference": reference}  # in order of preference


def _forced_backend() -> str | None:
    name = os.environ.get("INVOLUTION_BACKEND") or None
    if name is not None and name not in _BACKENDS:
        raise ValueError(f"INVOLUTION_BACKEND must be one of {', '.join(_BACKENDS)}, got {name!r}")
    return name


forced = _forced_backend()  # read once; None leaves the choice to the tensors


class Backend(NamedTuple):
    """What one backend says of a call.

    `available`: it can run in this process. `serves`: it is the one that runs this call (asked in general: it runs
    some calls). `reason`: why it does not, empty where it does.
    """

    name: str
    available: bool
    serves: bool
    reason: str


def backends(*call: Any, **options: Any) -> list[Backend]:
    """Every backend, with the reason why it does or does not serve.

    Args:
        call: nothing, for the state in general; or the arguments of an involution1d/2d/3d call, input and kernel
            map first.
        options: that call's stride, padding and dilation, where given by keyword.

    Returns:
        One record (name, available, serves, reason) per backend, the preferred first. For a call exactly one serves.

    Raises:
        TypeError, ValueError: what the call itself would raise.

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
    """The backend that runs a map on tensors like this one.

    Raises:
        RuntimeError: INVOLUTION_BACKEND forces one that cannot.
    """
    for name, module in _BACKENDS.items():
        if not refusal(name, tensor):
            if module is reference and forced is None and tensor.device.type == "cpu":
                _warn_slow(refusal("cpu", tensor))
            return module
    raise RuntimeError(f"INVOLUTION_BACKEND={forced} cannot serve this call: {refusal(str(forced), tensor)}")


def refusal(name: str, tensor: Tensor | None = None) -> str:
    """Why a backend does not run a call on such tensors; empty if it can."""
    if forced not in (None, name):
        return f"INVOLUTION_BACKEND={forced} forbids it"
    reason: str = _BACKENDS[name].why_not(tensor)
    return reason


def fuses(tensor: Tensor) -> bool:
    """Whether the backend that serves such a tensor runs the fused layer as one kernel: else its steps are as fast."""
    return any(module.fuses(tensor) for name, module in _BACKENDS.items() if forced in (None, name))


def why_not_fused(tensor: Tensor) -> str:
    """Why no backend has a fused kernel for such a tensor: what each of those that have one at all says."""
    reasons = {name: refusal(name, tensor) for name, module in _BACKENDS.items() if module is not reference}
    return "; ".join(f"{name}: {reason or f'none for {tensor.dtype}'}" for name, reason in reasons.items())


def _record(name: str, refusal: str, asked_for: bool) -> Backend:
    available = not _BACKENDS[name].why_not(None)
    serves = asked_for and not refusal
    return Backend(name, available, serves, "" if serves else refusal or "a preferred backend serves")


_warned = False


def _warn_slow(reason: str) -> None:
    global _warned
    if not _warned:
        _warned = True
        message = "involution runs on its reference path, which is several times slower than its CPU kernels: "
        warnings.warn(message + reason, RuntimeWarning, stacklevel=1)  # torch's dispatcher hides the caller's line
