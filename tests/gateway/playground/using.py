"""A user's actions on the playground."""

from collections.abc import Callable
from pathlib import Path

from playwright.sync_api import FloatRect, Locator, Page, expect

SAMPLES = Path(__file__).parents[3] / "demo" / "samples"
TAP = '<think>“设置”在屏幕上，点击它。</think><answer>do(action="Tap", element=[626,200])'
BACK = '<think>Go back.</think>\n<answer>do(action="Back")'
Open = Callable[..., Page]


def choose(page: Page, name: str) -> None:
    """Choose one of the demo's screenshots."""
    page.set_input_files("#file", SAMPLES / name)
    expect(page.locator("#shot")).to_be_visible()


def ask(page: Page, words: str) -> Locator:
    """Type a task and press Enter. Returns the new step."""
    step = page.locator(".step").nth(page.locator(".step").count())
    page.fill("#words", words)
    page.keyboard.press("Enter")
    step.wait_for()
    return step


def answered(page: Page, words: str) -> Locator:
    """Like `ask`, but wait for the end of the answer."""
    step = ask(page, words)
    expect(step.locator(".measures")).to_be_visible()
    return step


def box_of(locator: Locator) -> FloatRect:
    """Position and size of a visible element, in pixels of the page."""
    box = locator.bounding_box()
    assert box is not None
    return box
