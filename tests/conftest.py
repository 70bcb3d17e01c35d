"""Settings every test shares."""

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile(
    "house", deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)
settings.load_profile("house")


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder of real images that INVOLUTION_DATA names; tests that need it skip without it."""
    folder = Path(os.environ.get("INVOLUTION_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no data: INVOLUTION_DATA ({folder}) is no folder")
    return folder
