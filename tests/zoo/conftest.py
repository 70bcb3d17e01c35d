import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread_and_seed(one_thread: None) -> None:
    """Seeds torch, so that weights are the same every time."""
    torch.manual_seed(0)
