"""Settings every test shares."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """A headless Chromium, the system's, driven by Playwright."""
    playwright = pytest.importorskip("playwright.sync_api", reason="no browser tests: playwright is not installed")
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("no browser tests: there is no chromium here (Debian: apt-get install chromium)")
    with playwright.sync_playwright() as driver:
        # Without a sandbox it runs as root too; without the GPU it starts faster.
        browser = driver.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()
