"""Options of a benchmark as its command line would give them, for the small checkpoint on the CPU."""

import argparse
from pathlib import Path

import pytest

from tests.conftest import Pair


@pytest.fixture
def options(plain: Pair, tmp_path: Path) -> argparse.Namespace:
    return argparse.Namespace(
        checkpoint=plain.checkpoint.path, machine="h200", setting="int8", out=tmp_path / "results", commit=None
    )
