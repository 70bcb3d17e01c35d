import pytest
import torch


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Seeds torch, so that weights are the same every time."""
    torch.manual_seed(0)
