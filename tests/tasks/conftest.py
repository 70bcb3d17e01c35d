import pytest


@pytest.fixture(autouse=True)
def _in_tmp_path(in_tmp_path: None) -> None:
    """Every test of this folder runs in its tmp_path."""
