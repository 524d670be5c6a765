"""A real browser on the playground, with a fake gateway."""

import shutil
from collections.abc import Iterator
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright

from tests.gateway.playground.fake_gateway import FakeGateway
from tests.gateway.playground.using import Open

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PATIENCE = 15_000  # milliseconds, on a busy machine
# The microphone is a generated tone, and its permission is granted.
ARGUMENTS = ["--no-sandbox", "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]


@pytest.fixture(scope="package")  # not "session": its event loop would disturb other tests
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("Chromium not found (apt-get install chromium)")
    expect.set_options(timeout=PATIENCE)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def fake_gateway() -> Iterator[FakeGateway]:
    with FakeGateway() as running:
        yield running


@pytest.fixture
def address(fake_gateway: FakeGateway) -> str:
    """URL of the page."""
    return fake_gateway.url


@pytest.fixture
def opened(browser: Browser, address: str) -> Iterator[Open]:
    """Opens the page with options of a browser context. The page must not have reported errors at the end."""
    contexts: list[BrowserContext] = []
    errors: list[str] = []

    def open_page(**options: Any) -> Page:
        usual = {"locale": "en-US", "viewport": {"width": 1180, "height": 800}, "reduced_motion": "reduce"}
        contexts.append(browser.new_context(**usual | options))
        page = contexts[-1].new_page()
        page.set_default_timeout(PATIENCE)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.goto(address)
        expect(page.locator("#served")).not_to_be_empty()
        return page

    yield open_page
    for context in contexts:
        context.close()
    refused = "Failed to load resource"  # an error response, which is not an error of the page
    assert [error for error in errors if refused not in error] == []


@pytest.fixture
def page(opened: Open) -> Page:
    return opened()
