"""One real tritonserver for all end-to-end tests, with the demo checkpoint."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from autoglm_launcher.server import TritonServer

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def demo_checkpoint() -> Path:
    return ROOT / "demo" / "checkpoint"


@pytest.fixture(scope="session")
def server(demo_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    """A server that has loaded every model. Its log is shown when it does not start."""
    log = tmp_path_factory.mktemp("server") / "server.log"
    with TritonServer(checkpoint=demo_checkpoint, config=ROOT / "autoglm-config.yaml", log_path=log) as running:
        yield running
