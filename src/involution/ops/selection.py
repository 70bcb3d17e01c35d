"""Which backend serves a call and, when asked, why the others do not."""

import os
import warnings
from types import ModuleType
from typing import Any, NamedTuple

from torch import Tensor

from . import cpu, gpu, reference

_BACKENDS: dict[str, ModuleType] = {"cpu": cpu, "triton": gpu, "reference": reference}  # in order of preference


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
    from .functional import check_call  # functional needs registration, which needs this module

    tensor, _ = check_call(*call, **options)
    chosen = backend_for(tensor)
    return [_record(name, refusal(name, tensor), module is chosen) for name, module in _BACKENDS.items()]


def backend_for(tensor: Tensor) -> ModuleType:
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
