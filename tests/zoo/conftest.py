import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread_and_seed(one_thread: None) -> None:
    """The same weights every time."""
    torch.manual_seed(0)
