"""Reads PaddleClas's weights (.pdparams) without Paddle, and without executing code that a file names.

A .pdparams file is a bare pickle of a dict, name -> numpy array. A pickle may name any function of Python and call it.
The reader admits only the names that pickled arrays need, and maps each to a class defined here, so that neither
numpy's code nor the file's is executed.
"""

import io
import math
import pickle
import pickletools
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

NAME_TABLE = "StructuredToParameterName@@"  # the entry with Paddle's own names of parameters, which is dropped
_STATISTICS = {"_mean": "running_mean", "_variance": "running_var"}
_LINEAR = ("fc.weight",)  # Paddle stores a linear layer's weight as [in, out], torch as [out, in]


class _DType:
    """Replaces numpy.dtype: little-endian numbers only."""

    known: ClassVar[dict[str, torch.dtype]] = {
        "f2": torch.float16,
        "f4": torch.float32,
        "f8": torch.float64,
        "i4": torch.int32,
        "i8": torch.int64,
    }

    def __init__(self, code: Any, align: Any = False, copy: Any = True) -> None:
        if code not in self.known:
            raise pickle.UnpicklingError(f"numpy.dtype must be one of {', '.join(self.known)}, got {code!r}")
        self.torch = self.known[code]

    def __setstate__(self, state: Any) -> None:
        _, order, subarray, names, fields, *_ = state
        if (order, subarray, names, fields) != ("<", None, None, None):
            raise pickle.UnpicklingError(f"numpy.dtype must be of little-endian numbers, got the state {state!r}")


class _Array:
    """Replaces numpy.ndarray: holds a tensor."""

    tensor: Tensor

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, data = state
        if not (isinstance(dtype, _DType) and isinstance(data, bytes)):
            raise pickle.UnpicklingError("numpy.ndarray must hold numbers as bytes, got other objects")
        count, size = math.prod(shape), dtype.torch.itemsize
        if len(data) != count * size or any(length < 0 for length in shape):
            raise pickle.UnpicklingError(f"an array of shape {shape} must hold {count * size} bytes, got {len(data)}")
        order = shape[::-1] if fortran else shape
        flat = torch.frombuffer(bytearray(data), dtype=dtype.torch) if data else torch.empty(0, dtype=dtype.torch)
        tensor = flat.reshape(order)
        self.tensor = tensor.permute(*reversed(range(tensor.dim()))).contiguous() if fortran else tensor


class _Fixed:
    """A callable that a pickle may call; setting its state is an error."""

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("a function must not be given a state")


class _Reconstruct(_Fixed):
    """Replaces numpy's _reconstruct: returns an empty array, which is filled by __setstate__."""

    def __new__(cls, subtype: Any, shape: Any, typecode: Any) -> Any:
        if subtype is not _Array:
            raise pickle.UnpicklingError(f"_reconstruct must make a numpy.ndarray, got {subtype!r}")
        return _Array()


class _Encode(_Fixed):
    """Replaces _codecs.encode, with which protocol 2 writes bytes."""

    def __new__(cls, text: Any, encoding: Any) -> Any:
        if not isinstance(text, str) or encoding != "latin1":
            raise pickle.UnpicklingError(f"_codecs.encode must make bytes of latin1, got {encoding!r}")
        return text.encode("latin1")


_ADMITTED: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): _Reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _Reconstruct,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _DType,
    ("_codecs", "encode"): _Encode,
    ("builtins", "tuple"): tuple,
    ("__builtin__", "tuple"): tuple,
}


class _Unpickler(pickle.Unpickler):
    """Resolves the names that pickled arrays need, and refuses all others."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ADMITTED:
            raise pickle.UnpicklingError(f"the global {module}.{name} is refused: weights need no such thing")
        return _ADMITTED[module, name]


def _check_memo(pickled: bytes) -> None:
    """Refuses an index into the memo that no pickle of this length needs: the unpickler would allocate up to it."""
    for operation, argument, _ in pickletools.genops(pickled):
        if "PUT" in operation.name and argument is not None and argument > len(pickled):
            raise pickle.UnpicklingError(f"a memo index must be at most {len(pickled)}, got {argument}")


def read_pdparams(file: Path) -> dict[str, Tensor]:
    """The tensors of a .pdparams file by name, in torch's conventions.

    Running statistics are renamed to torch's, and num_batches_tracked is 0. `fc.weight` is always transposed, because
    the format stores it as [in, out]. Values are arrays, or tuples (Paddle's name, array).

    Args:
        file: a pickle of protocol 2 to 4.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no such pickle, or names a global that arrays do not need; the message names the global.
    """
    try:
        pickled = file.read_bytes()
        _check_memo(pickled)
        content = _Unpickler(io.BytesIO(pickled)).load()
    except FileNotFoundError:
        raise
    except Exception as error:  # a damaged pickle may raise anything
        raise ValueError(f"weights must be a .pdparams file, got {file}: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"weights must be a .pdparams file, a dict of arrays, got {file}, a {type(content).__name__}")
    content.pop(NAME_TABLE, None)
    weights: dict[str, Tensor] = {}
    for name, value in content.items():
        array = value[1] if isinstance(value, tuple) and len(value) == 2 else value
        tensor = getattr(array, "tensor", None) if isinstance(array, _Array) else None
        if not isinstance(name, str) or tensor is None:
            raise ValueError(f"weights must be arrays by name, got {file}, where {name!r} is no array")
        weights.update(_in_torch(name, tensor))
    if not weights:
        raise ValueError(f"weights must be arrays by name, got {file}, which holds none")
    return weights


def _in_torch(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """An array of Paddle's by torch's name and in torch's layout; with a variance comes the count of batches."""
    layer, dot, kind = name.rpartition(".")
    if kind not in _STATISTICS:
        return {name: tensor.t().contiguous() if name in _LINEAR and tensor.dim() == 2 else tensor}
    named = {f"{layer}{dot}{_STATISTICS[kind]}": tensor}
    return named | ({f"{layer}{dot}num_batches_tracked": torch.tensor(0)} if kind == "_variance" else {})
