"""The playground with a real gateway and a real server with the demo checkpoint."""

import json
import re
from pathlib import Path
from typing import Any, Literal

import pytest
from PIL import Image, ImageStat
from playwright.sync_api import Browser, Page, expect

from tests.gateway.playground.using import SAMPLES, answered, ask, box_of, choose
from tests.gateway.playground_served.pictures import DOCS, take

ENTRIES = json.loads((SAMPLES / "samples.json").read_text(encoding="utf-8"))
TAPS = [entry for entry in ENTRIES if "box" in entry][:4]


@pytest.mark.parametrize("sample", TAPS, ids=lambda sample: sample["task"])
def test_draws_the_tap_on_its_target(page: Page, sample: dict[str, Any]) -> None:
    choose(page, sample["image"])
    step = answered(page, sample["task"])
    expect(step.locator(".thought")).not_to_be_empty()
    expect(step.locator(".chip")).to_contain_text("Tap ")
    screen, dot = box_of(page.locator("#shot")), box_of(page.locator("#marks .ink.solid"))
    x = 1000 * (dot["x"] + dot["width"] / 2 - screen["x"]) / screen["width"]
    y = 1000 * (dot["y"] + dot["height"] / 2 - screen["y"]) / screen["height"]
    left, top, right, bottom = sample["box"]
    assert left <= x <= right and top <= y <= bottom


def test_follows_a_task_of_several_steps_and_shows_their_times(page: Page) -> None:
    choose(page, "form.png")
    first = answered(page, "Type hello world in Email")
    expect(first.locator(".chip")).to_have_text("Type hello world")
    choose(page, "toolbar.png")
    second = answered(page, "open Settings")
    expect(second.locator(".chip")).to_contain_text("Tap ")
    for step in (first, second):
        figures = " ".join(step.locator(".figures").first.inner_text().split())
        assert re.fullmatch(
            r"[\d.]+ ms first token [\d.]+ ms total \d+ tokens/s \d+ in( \(\d+ cached\))? \d+ out", figures
        )
        stages = step.locator(".legend").inner_text()
        assert "vision" in stages or "prefill" in stages
        assert "decode" in stages
        expect(step.locator(".stages i.decode")).to_be_visible()


def test_a_stopped_step_can_be_repeated(page: Page) -> None:
    page.locator("#options > summary").click()
    page.get_by_label("System prompt").fill("x")
    choose(page, "launcher.png")
    step = ask(page, "打开设置")
    page.keyboard.press("Escape")
    expect(step.locator(".warning, .chip").first).to_be_visible()  # stopped, unless the answer came first
    expect(answered(page, "打开设置").locator(".chip")).to_contain_text("Tap ")


def test_errors_of_the_server_are_shown(page: Page) -> None:
    page.locator("#options > summary").click()
    page.get_by_label("top_p", exact=True).fill("5")
    step = ask(page, "打开设置")
    expect(step.get_by_role("alert")).to_have_text(
        re.compile(r"The server refused the request\. top_p must be .* \(got 5\)")
    )


def test_speech_on_a_server_without_a_speech_encoder(page: Page) -> None:
    page.get_by_role("button", name="Record the task").click()
    page.wait_for_timeout(400)
    page.get_by_role("button", name="Send").click()
    alert = page.locator(".step").get_by_role("alert")
    expect(alert).to_contain_text("The server does not support speech.")


def test_inline_scripts_are_blocked(browser: Browser, address: str) -> None:
    page = browser.new_page()
    page.goto(address)
    refused = page.evaluate(
        """() => new Promise((done) => {
            addEventListener("securitypolicyviolation", (event) => done(event.effectiveDirective), { once: true });
            const script = document.createElement("script");
            script.textContent = "window.ran = true";
            document.body.append(script);
            setTimeout(done, 1000);
        })"""
    )
    assert (refused, page.evaluate("window.ran")) == ("script-src-elem", None)
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_pictures_of_the_documentation(
    browser: Browser, address: str, scheme: Literal["light", "dark"], tmp_path: Path
) -> None:
    take(browser, address, scheme, tmp_path / "now.png")
    stored = DOCS / f"playground-{scheme}.png"
    assert stored.stat().st_size < 200_000
    assert f"({stored.name})" in (DOCS / "api.md").read_text(encoding="utf-8")
    with Image.open(stored) as old, Image.open(tmp_path / "now.png") as new:
        assert old.size == new.size
        levels = [ImageStat.Stat(image.convert("L")).mean[0] for image in (old, new)]
        assert abs(levels[0] - levels[1]) < 5  # the same page in the same colours
