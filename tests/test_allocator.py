"""malloc keeps freed memory: counted in page faults, and what prevents it."""

import ctypes
import os
import subprocess
import sys

import pytest

from involution import allocator

FAULTS = """
import ctypes, resource
from involution.allocator import keep_freed_memory

print(keep_freed_memory())
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.memset.argtypes, libc.free.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t], [ctypes.c_void_p]
for _ in range(5):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = libc.malloc(64 << 20)
    libc.memset(block, 1, 64 << 20)
    libc.free(block)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
on_glibc = pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"), reason="malloc is not glibc's")


def faults(**environment: str) -> tuple[str, list[int]]:
    """What keep_freed_memory returns in a fresh process, and the page faults of five blocks of 64 MiB."""
    output = subprocess.check_output([sys.executable, "-c", FAULTS], env=os.environ | environment, text=True)
    returned, *counts = output.split()
    return returned, [int(count) for count in counts]


@on_glibc
def test_freed_blocks_are_used_again_without_page_faults():
    returned, kept = faults()
    assert returned == "True"
    assert max(kept[1:]) < 16 <= kept[0]


@on_glibc
@pytest.mark.parametrize("variable", [{"INVOLUTION_KEEP_MEMORY": "0"}, {"MALLOC_ARENA_MAX": "4"}])
def test_the_environment_leaves_malloc_as_it_is(variable):
    returned, counts = faults(**variable)
    assert returned == "False"
    assert min(counts) >= 16  # at least one for every huge page


@pytest.fixture(autouse=True)
def unconfigured(monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment that does not configure malloc, in a process that has not called keep_freed_memory."""
    for name in os.environ:
        if name.startswith(("MALLOC_", "GLIBC_TUNABLES", "INVOLUTION_KEEP_MEMORY")):
            monkeypatch.delenv(name)
    monkeypatch.setattr(allocator, "_kept", False)


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("INVOLUTION_KEEP_MEMORY", "0", "INVOLUTION_KEEP_MEMORY is 0"),
        ("MALLOC_TOP_PAD_", "1", "the environment configures malloc: MALLOC_TOP_PAD_"),
        ("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1", "the environment configures malloc: GLIBC_TUNABLES"),
    ],
)
def test_reasons(name, value, reason, monkeypatch):
    monkeypatch.setenv(name, value)
    assert allocator.why_not() == reason


def test_a_wrong_value_is_refused(monkeypatch):
    monkeypatch.setenv("INVOLUTION_KEEP_MEMORY", "yes")
    with pytest.raises(ValueError, match="INVOLUTION_KEEP_MEMORY must be 0 or 1, got 'yes'"):
        allocator.keep_freed_memory()


def test_another_malloc_is_left_alone(monkeypatch):
    monkeypatch.setattr(allocator, "_libc", lambda: object())
    assert allocator.why_not() == "malloc is not glibc's"
    assert allocator.keep_freed_memory() is False
