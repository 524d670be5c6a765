"""Gateways in front of a fake server (the fast tier) and of one real tritonserver with the demo checkpoint."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from openai import OpenAI

from autoglm_launcher.server import TritonServer
from gateway.app import create_app
from tests.client.fake_server import FakeServer
from tests.e2e.conftest import demo_checkpoint, server
from tests.gateway.running import configured, serve

__all__ = ["demo_checkpoint", "server"]

MARKS = {"demo_checkpoint": "tritonserver", "browser": "browser"}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of this folder that need a tritonserver or a browser, by the fixtures that start them."""
    for item in items:
        if isinstance(item, pytest.Function) and item.path.is_relative_to(Path(__file__).parent):
            for fixture in MARKS.keys() & set(item.fixturenames):
                item.add_marker(MARKS[fixture])


@pytest.fixture(scope="session")
def fake() -> Iterator[FakeServer]:
    with FakeServer() as running:
        yield running


@pytest.fixture(scope="session")
def api_url(fake: FakeServer) -> Iterator[str]:
    """URL of a gateway to the fake server."""
    with serve(create_app(fake.url, configured())) as url:
        yield url


@pytest.fixture(scope="session")
def api(api_url: str) -> Iterator[httpx.Client]:
    """A client of the gateway to the fake server."""
    with httpx.Client(base_url=api_url, timeout=30) as client:
        yield client


@pytest.fixture(scope="session")
def gateway(server: TritonServer) -> Iterator[str]:
    """URL of a gateway to the real server."""
    with serve(create_app(server.grpc_url, configured())) as url:
        yield url


@pytest.fixture(scope="session")
def http(gateway: str) -> Iterator[httpx.Client]:
    """A client of the gateway to the real server."""
    with httpx.Client(base_url=gateway, timeout=60) as client:
        yield client


@pytest.fixture(scope="session")
def openai(gateway: str) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{gateway}/v1", api_key="EMPTY", max_retries=0) as client:
        yield client


@pytest.fixture(scope="session", params=["fake", pytest.param("real", marks=pytest.mark.tritonserver)])
def grpc_url(request: pytest.FixtureRequest) -> str:
    """Address of the fake server, then of the real one."""
    return str(
        request.getfixturevalue("fake").url if request.param == "fake" else request.getfixturevalue("server").grpc_url
    )


@pytest.fixture(scope="session")
def any_http(grpc_url: str) -> Iterator[httpx.Client]:
    """A client of a gateway to the fake server, then to the real one."""
    with serve(create_app(grpc_url, configured())) as url, httpx.Client(base_url=url, timeout=60) as client:
        yield client
