"""glibc's malloc: whether it keeps freed memory, which saves a page fault for every 4 KiB that a network allocates."""

import ctypes
import os
from typing import Any

_VARIABLE = "INVOLUTION_KEEP_MEMORY"
# Parameters of mallopt (malloc.h), and values with which large blocks come from the heap and stay there.
_PARAMETERS = {
    "M_TOP_PAD": (-2, 256 << 20),  # bytes: the heap grows in steps of 256 MiB
    "M_TRIM_THRESHOLD": (-1, -1),  # never shrinks
    "M_MMAP_MAX": (-4, 0),  # no block has a mapping of its own
}
_kept = False


def keep_freed_memory() -> bool:
    """Makes glibc's malloc keep freed memory for the next allocation, from now on and for the whole process.

    By default glibc returns large blocks to the operating system, and every page that comes back costs a fault; an
    eager training step or inference of a network frees and allocates all of its activations. Afterwards the process
    keeps its peak memory until it ends. `involution fit`, `validate`, `test`, `predict` and `bench` call this when
    they start; `import involution` does not. Calling it twice is the same as once.

    A malloc that is loaded before glibc's (jemalloc, tcmalloc) is not told apart from it and not affected. Nothing is
    changed where malloc is not glibc's (macOS, Windows, musl), where the environment configures malloc
    already (a variable that begins with ``MALLOC_``, or glibc.malloc in GLIBC_TUNABLES), and where the environment
    variable INVOLUTION_KEEP_MEMORY is 0.

    Returns:
        Whether freed memory is kept because of a call of this function.

    Raises:
        ValueError: INVOLUTION_KEEP_MEMORY is neither 0 nor 1.
    """
    global _kept
    if why_not() is None and not _kept:
        _kept = all(_libc().mallopt(*given) for given in _PARAMETERS.values())
    return _kept


def why_not() -> str | None:
    """Why `keep_freed_memory` changes nothing in this process; None if it does.

    Raises:
        ValueError: INVOLUTION_KEEP_MEMORY is neither 0 nor 1.
    """
    wanted = os.environ.get(_VARIABLE, "1")
    if wanted not in ("0", "1"):
        raise ValueError(f"{_VARIABLE} must be 0 or 1, got {wanted!r}")
    if wanted == "0":
        return f"{_VARIABLE} is 0"
    names = [name for name in os.environ if name.startswith("MALLOC_")]
    names += ["GLIBC_TUNABLES"] if "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "") else []
    if names:
        return f"the environment configures malloc: {', '.join(sorted(names))}"
    return None if hasattr(_libc(), "gnu_get_libc_version") else "malloc is not glibc's"


def _libc() -> Any:
    """The process's symbols; None on Windows, which cannot give them."""
    return ctypes.CDLL(None) if os.name == "posix" else None
