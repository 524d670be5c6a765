"""What a person does with the playground."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from playwright.sync_api import FloatRect, Locator, Page, expect

SAMPLES = Path(__file__).parents[3] / "demo" / "samples"
TAP = '<think>“设置”在屏幕上，点击它。</think><answer>do(action="Tap", element=[626,200])'
BACK = '<think>Go back.</think>\n<answer>do(action="Back")'
Open = Callable[..., Page]


def choose(page: Page, name: str) -> None:
    """Take one of the demo's screenshots."""
    page.set_input_files("#file", SAMPLES / name)
    expect(page.locator("#shot")).to_be_visible()


def ask(page: Page, words: str) -> Locator:
    """Type, press Enter; the new step on the page."""
    step = page.locator(".step").nth(page.locator(".step").count())
    page.fill("#words", words)
    page.keyboard.press("Enter")
    step.wait_for()
    return step


def answered(page: Page, words: str) -> Locator:
    """The same, and wait for the answer's end."""
    step = ask(page, words)
    expect(step.locator(".measures")).to_be_visible()
    return step


def box_of(locator: Locator) -> FloatRect:
    """Where an element that can be seen lies, in pixels of the page."""
    box = locator.bounding_box()
    assert box is not None
    return box
