import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread():
    """One thread: networks this small gain little from two, and lose much where another process has the second core."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
