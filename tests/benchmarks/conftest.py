"""A benchmark's options for the small checkpoint on the CPU, and the documentation."""

import argparse
from pathlib import Path

import pytest

from tests.conftest import Pair

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def weight_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTOGLM_CACHE", str(tmp_path / "weights"))


@pytest.fixture
def options(plain: Pair, tmp_path: Path) -> argparse.Namespace:
    return argparse.Namespace(
        checkpoint=plain.checkpoint.path, machine="h200", setting="int8", out=tmp_path / "results", commit=None
    )


@pytest.fixture(scope="session")
def documentation() -> str:
    """The README and all pages of docs/."""
    return "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *ROOT.glob("docs/**/*.md")))
