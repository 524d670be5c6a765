"""End-to-end tests: one real tritonserver with the demo checkpoint."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from autoglm_launcher.server import TritonServer

ROOT = Path(__file__).parents[2]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.tritonserver)


@pytest.fixture(scope="session")
def demo_checkpoint() -> Path:
    return ROOT / "demo" / "checkpoint"


@pytest.fixture(scope="session")
def server(demo_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    """A server with all models loaded."""
    log = tmp_path_factory.mktemp("server") / "server.log"
    with TritonServer(checkpoint=demo_checkpoint, config=ROOT / "autoglm-config.yaml", log_path=log) as running:
        yield running
