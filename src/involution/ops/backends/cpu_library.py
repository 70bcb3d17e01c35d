"""Loads the C++ kernels of csrc/ and declares their C ABI (csrc/involution.h).

The library links libgomp by its plain soname and torch is imported first, so that both share one OpenMP runtime.
"""

import ctypes
import os
import statistics
import time
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ..geometry import MAPS
from ..layer import LayerParts

SUFFIX = {torch.float32: "f32", torch.float64: "f64", torch.float16: "f16", torch.bfloat16: "bf16"}
TENSORS = LayerParts._fields[:-3]
_FILE = "libinvolution.so"


class CGeometry(ctypes.Structure):
    """`involution_geometry` of csrc/involution.h. Missing leading axes have size 1."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batch", "channels", "groups")),
        *((name, ctypes.c_int64 * 3) for name in ("input", "kernel", "output", "stride", "padding", "dilation")),
        *((name, ctypes.c_int64) for name in ("channels_last", "threads", "accumulate")),
    ]


class CFusedLayer(ctypes.Structure):
    """`involution_fused_layer` of csrc/involution.h, field by field."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in (*TENSORS, "output", "next_reduce_output", "workspace")),
        *((name, ctypes.c_int64) for name in ("hidden_channels", "expand_channels", "next_reduce_channels")),
        *((name, ctypes.c_int64) for name in ("relu", "expand_relu")),
        ("rms_eps", ctypes.c_double),
    ]


class CBatchNorm(ctypes.Structure):
    """`involution_batch_norm` of csrc/involution.h, field by field."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("rows", "channels", "threads", "relu")),
        ("eps", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in ("x", "weight", "bias", "shortcut", "dy")),
        *((name, ctypes.c_void_p) for name in ("y", "mean", "variance", "dx", "dweight", "dbias", "dshortcut")),
        ("workspace", ctypes.c_void_p),
    ]


class CChannelNorm(ctypes.Structure):
    """`involution_channel_norm` of csrc/involution.h, field by field."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("rows", "channels", "threads", "relu")),
        *((name, ctypes.c_double) for name in ("eps", "scale")),
        *((name, ctypes.c_void_p) for name in ("x", "dy", "y", "dx")),
    ]


def instruction_set() -> str:
    """The instruction set in use: avx512, avx2 or baseline.

    Raises:
        RuntimeError: the library is not loaded.
    """
    name: bytes = _loaded().involution_instruction_set()
    return name.decode()


def peak_flops(seconds: float = 0.2) -> float:
    """The float32 operations per second that all of torch's threads reach in registers, a multiply-add being two.

    Args:
        seconds: how long to measure, at least.
    """
    threads, end = torch.get_num_threads(), time.perf_counter() + seconds
    rates: list[float] = []
    while time.perf_counter() < end or not rates:
        start = time.perf_counter()
        operations = function("involution_multiply_adds")(threads, 500_000)
        rates.append(operations / (time.perf_counter() - start))
    return statistics.quantiles([*rates, rates[-1]], n=10)[-1]  # near the best: a single best could be a timer's error


def library() -> ctypes.CDLL | None:
    """The loaded kernels, or None."""
    return _load()[0]


def why_not_loaded() -> str:
    """Why there are no kernels; empty if there are."""
    return _load()[1]


@cache
def function(name: str) -> Any:
    """A function of the library by its name in C."""
    return getattr(_loaded(), name)


def _loaded() -> ctypes.CDLL:
    found = library()
    if found is None:
        raise RuntimeError(f"the CPU kernels cannot be used: {why_not_loaded()}")
    return found


@cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    file = path()
    if file is None:
        return None, f"{_FILE} is not installed (was this installed with INVOLUTION_NATIVE=0, or without a compiler?)"
    try:
        loaded = ctypes.CDLL(str(file))
    except OSError as error:
        return None, f"{file} does not load: {error}"
    for name in (map.name for map in MAPS):
        for suffix in SUFFIX.values():
            function = getattr(loaded, f"involution_{name}_{suffix}")
            function.argtypes = [ctypes.POINTER(CGeometry), *[ctypes.c_void_p] * 3]
            function.restype = None
    for suffix in ("f32", "f64"):
        function = getattr(loaded, f"involution_fused_layer_{suffix}")
        function.argtypes = [ctypes.POINTER(CGeometry), ctypes.POINTER(CFusedLayer)]
        function.restype = None
        for name, struct in (("batch_norm", CBatchNorm), ("channel_norm", CChannelNorm)):
            for direction in ("", "_backward"):
                function = getattr(loaded, f"involution_{name}{direction}_{suffix}")
                function.argtypes, function.restype = [ctypes.POINTER(struct)], None
    loaded.involution_fused_layer_workspace.argtypes = [ctypes.POINTER(CGeometry), ctypes.POINTER(CFusedLayer)]
    loaded.involution_fused_layer_workspace.restype = ctypes.c_int64
    loaded.involution_batch_norm_workspace.argtypes = [ctypes.POINTER(CBatchNorm)]
    loaded.involution_batch_norm_workspace.restype = ctypes.c_int64
    loaded.involution_multiply_adds.argtypes = [ctypes.c_int64] * 2
    loaded.involution_multiply_adds.restype = ctypes.c_double
    loaded.involution_instruction_set.restype = ctypes.c_char_p
    loaded.involution_use.argtypes = [ctypes.c_char_p]
    wanted = os.environ.get("INVOLUTION_ISA")
    if wanted and not loaded.involution_use(wanted.encode()):
        raise ValueError(f"INVOLUTION_ISA={wanted!r}: wanted avx512, avx2 or baseline, and one that this CPU can run")
    return loaded, ""


def path() -> Path | None:
    """The library beside this file or, in an editable install, where the installer put it."""
    beside = Path(__file__).with_name(_FILE)
    if beside.exists():
        return beside
    try:
        installed = Path(str(metadata.distribution("involution").locate_file(f"involution/ops/backends/{_FILE}")))
    except metadata.PackageNotFoundError:
        return None
    return installed if installed.exists() else None
