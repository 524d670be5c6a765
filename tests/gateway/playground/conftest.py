"""A real browser on the playground, and what stands in for the gateway behind it."""

import shutil
from collections.abc import Iterator
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright

from tests.gateway.playground.stand_in import StandIn
from tests.gateway.playground.using import Open

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PATIENCE = 15_000  # milliseconds, on a busy machine
# Without a window no one can click: the microphone is a tone, and is allowed.
ARGUMENTS = ["--no-sandbox", "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]


@pytest.fixture(scope="package")  # longer, and its event loop would be in the way of others
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("no Chromium found; it needs: apt-get install chromium")
    expect.set_options(timeout=PATIENCE)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def server() -> Iterator[StandIn]:
    with StandIn() as server:
        yield server


@pytest.fixture
def address(server: StandIn) -> str:
    """Where the page is."""
    return server.url


@pytest.fixture
def opened(browser: Browser, address: str) -> Iterator[Open]:
    """Opens the page with the options of a browser context; at the end nothing must have gone wrong in it."""
    contexts: list[BrowserContext] = []
    troubles: list[str] = []

    def open_page(**options: Any) -> Page:
        usual = {"locale": "en-US", "viewport": {"width": 1180, "height": 800}, "reduced_motion": "reduce"}
        contexts.append(browser.new_context(**usual | options))
        page = contexts[-1].new_page()
        page.set_default_timeout(PATIENCE)
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on("console", lambda message: troubles.append(message.text) if message.type == "error" else None)
        page.goto(address)
        expect(page.locator("#served")).not_to_be_empty()
        return page

    yield open_page
    for context in contexts:
        context.close()
    refused = "Failed to load resource"  # by the server: that is no trouble of the page
    assert [trouble for trouble in troubles if refused not in trouble] == []


@pytest.fixture
def page(opened: Open) -> Page:
    return opened()
