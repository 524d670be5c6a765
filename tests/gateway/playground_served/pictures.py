"""Takes the documentation's pictures of the playground, from a running gateway with the demo checkpoint.

    python -m tests.gateway.playground_served.pictures http://127.0.0.1:8080

writes docs/playground-light.png and docs/playground-dark.png.
"""

import sys
from pathlib import Path
from typing import Literal

from playwright.sync_api import Browser, expect, sync_playwright

from tests.gateway.playground.conftest import ARGUMENTS, CHROMIUM
from tests.gateway.playground.using import answered, choose

DOCS = Path(__file__).parents[3] / "docs"
STEPS = {  # screenshots and tasks of the demo; the last answer is a tap
    "light": {"form.png": "Type hello world in Email", "toolbar.png": "open Settings"},
    "dark": {"search.png": "输入火锅", "launcher.png": "打开设置"},
}


def take(browser: Browser, address: str, scheme: Literal["light", "dark"], path: Path) -> None:
    """A picture of the page in a colour scheme, after a task of two steps."""
    context = browser.new_context(
        locale="en-US", viewport={"width": 1120, "height": 760}, color_scheme=scheme, reduced_motion="reduce"
    )
    page = context.new_page()
    page.goto(address)
    expect(page.locator("#served")).not_to_be_empty()
    for image, task in STEPS[scheme].items():
        choose(page, image)
        answered(page, task)
    expect(page.locator("#marks .ink").first).to_be_visible()
    page.screenshot(path=path)
    context.close()


def main(address: str) -> None:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        take(browser, address, "light", DOCS / "playground-light.png")
        take(browser, address, "dark", DOCS / "playground-dark.png")
        browser.close()


if __name__ == "__main__":
    main(sys.argv[1])
