import os
from collections.abc import Iterator

import pytest
from harness import INTERPRETED, one_tile, threads, use_tiles


@pytest.fixture(scope="session", autouse=True)
def _one_tile_where_interpreted() -> Iterator[None]:
    """The interpreter is slow; test_gpu_interpreted.py tries the tiles that are launched on a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        if INTERPRETED:
            use_tiles(patch, one_tile)
        yield


@pytest.fixture(autouse=True)
def _all_threads() -> Iterator[None]:
    """Kernels are tested with as many threads as there are cores."""
    with threads(len(os.sched_getaffinity(0))):
        yield
