"""One real tritonserver with the demo checkpoint, and one gateway in front of it, for all tests of the gateway."""

from collections.abc import Iterator

import httpx
import pytest
from openai import OpenAI

from autoglm_launcher.server import TritonServer
from gateway.app import create_app
from tests.e2e.conftest import demo_checkpoint, server
from tests.gateway.running import configured, serve

__all__ = ["demo_checkpoint", "server"]


@pytest.fixture(scope="session")
def gateway(server: TritonServer) -> Iterator[str]:
    """Its address."""
    with serve(create_app(server.grpc_url, configured())) as url:
        yield url


@pytest.fixture(scope="session")
def http(gateway: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=gateway, timeout=60) as client:
        yield client


@pytest.fixture(scope="session")
def openai(gateway: str) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{gateway}/v1", api_key="EMPTY", max_retries=0) as client:
        yield client
