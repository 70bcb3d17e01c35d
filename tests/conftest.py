"""Settings every test shares."""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile(
    "involution", deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)
settings.load_profile("involution")


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder of real images that INVOLUTION_DATA names; tests that need it skip without it."""
    name = os.environ.get("INVOLUTION_DATA")
    if not name or not Path(name).is_dir():
        pytest.skip(f"no data: INVOLUTION_DATA must name their folder, got {name!r}")
    return Path(name)


def pytest_configure() -> None:
    """One thread here and in subprocesses: small tensors on busy cores take ten times longer on two."""
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture
def in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The working directory, where runs write to unless trainer.default_root_dir names another folder."""
    monkeypatch.chdir(tmp_path)
