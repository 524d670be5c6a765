from pathlib import Path

import pytest

from demo.fonts import missing_packages

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def checkpoint_directory() -> Path:
    return ROOT / "demo" / "checkpoint"


@pytest.fixture(scope="session")
def samples_directory() -> Path:
    return ROOT / "demo" / "samples"


@pytest.fixture(scope="session")
def fonts() -> None:
    """Skips a test that draws screens if fonts are missing."""
    if packages := missing_packages():
        pytest.skip(f"drawing screens needs fonts: apt-get install --no-install-recommends {' '.join(packages)}")
