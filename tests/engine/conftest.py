import pytest


@pytest.fixture(autouse=True)
def _one_thread_in_tmp_path(one_thread: None, in_tmp_path: None) -> None:
    """One thread for every test of this folder, whose runs write below tmp_path."""
