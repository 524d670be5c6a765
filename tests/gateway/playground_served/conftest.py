"""The playground of a gateway to a real server."""

import pytest

from tests.gateway.playground.conftest import browser, opened, page

__all__ = ["browser", "opened", "page"]


@pytest.fixture
def address(gateway: str) -> str:
    return gateway
