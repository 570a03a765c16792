"""Shared test helpers: small random models, and the lookup of real data kept beside the checkout."""

import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants

from .hub import Hub

AXE = "4.14.1"  # of axe-core
SHARED = Path(__file__).resolve().parents[2] / "shared"


def pytest_configure(config: pytest.Config) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:  # several threads in each of several processes crawl
        torch.set_num_threads(1)
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # of what tests start


@pytest.fixture(scope="session")
def cuda() -> torch.device:
    """The GPU; where there is none the test is skipped and says so."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device: this test did NOT run, and nothing here says how the reduction behaves on one")
    return torch.device("cuda")


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """Debian's Chromium, headless; where there is none the test is skipped, or fails where it is required."""
    executable = shutil.which("chromium")
    if executable is None:
        reason = "no Chromium: this test did NOT run; apt-get install chromium"
        if os.environ.get("TIMM_CSRA_REQUIRE_DATA"):
            pytest.fail(reason)
        pytest.skip(reason)
    from playwright.sync_api import sync_playwright

    quiet = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=[*quiet, "--disable-sync"])
        yield browser
        browser.close()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A Hub on loopback instead of the one on the internet."""
    hub = Hub()
    with hub.serve() as url:
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield hub


@pytest.fixture(scope="session")
def axe(request: pytest.FixtureRequest) -> str:
    """The text of axe-core, from npm once and from pytest's cache from then on; where it cannot be had the test is
    skipped, or fails where it is required."""
    kept = request.config.cache.mkdir("axe-core") / f"{AXE}.js"
    if not kept.is_file():
        with tempfile.TemporaryDirectory() as folder:
            command = ["npm", "pack", "--silent", f"axe-core@{AXE}"]
            try:
                subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=120)
            except (OSError, subprocess.SubprocessError) as error:
                reason = f"no axe-core: this test did NOT run; {' '.join(command)}: {error}"
                if os.environ.get("TIMM_CSRA_REQUIRE_DATA"):
                    pytest.fail(reason)
                pytest.skip(reason)
            with tarfile.open(Path(folder) / f"axe-core-{AXE}.tgz") as packed:
                source = packed.extractfile("package/axe.min.js")
                assert source is not None
                part = Path(folder) / "axe.js"
                part.write_bytes(source.read())
            own = kept.with_name(f"{os.getpid()}.js")
            shutil.copy(part, own)
            own.replace(kept)  # at once: several processes may do this
    return kept.read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of real photographs; without it the test is skipped, or fails where the data is required."""
    return _shared("data")


@pytest.fixture(scope="session")
def real_weights() -> Path:
    """Folder of small trained checkpoints; without it the test is skipped, or fails where they are required."""
    return _shared("weights")


def _shared(name: str) -> Path:
    folder = SHARED / name
    if not folder.is_dir():
        reason = f"real {name} not found at {folder}: this test did NOT run"
        if os.environ.get("TIMM_CSRA_REQUIRE_DATA"):
            pytest.fail(reason)
        pytest.skip(reason)
    return folder
