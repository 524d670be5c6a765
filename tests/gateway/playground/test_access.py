"""Accessibility: keyboard, sizes, colours, motion, languages."""

import pytest
from playwright.sync_api import Page, expect

from tests.gateway.playground.fake_gateway import FakeGateway, ScriptedAnswer
from tests.gateway.playground.using import BACK, TAP, Open, answered, ask, box_of, choose


def test_can_be_used_with_the_keyboard_alone(page: Page, fake_gateway: FakeGateway) -> None:
    choose(page, "launcher.png")
    expect(page.locator("#words")).to_be_focused()
    page.keyboard.type("two")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("lines")
    assert page.input_value("#words") == "two\nlines"
    fake_gateway.will_answer(BACK)
    page.keyboard.press("Enter")
    expect(page.locator(".chip")).to_be_visible()
    page.get_by_role("button", name="New task").focus()
    reached = []
    for _ in range(7):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("(document.activeElement.title || document.activeElement.textContent.trim())"))
        outline, border = page.evaluate(
            """[getComputedStyle(document.activeElement).outlineStyle,
                getComputedStyle(document.activeElement.parentElement).boxShadow]"""
        )
        assert outline != "none" or border != "none", reached[
            -1
        ]  # the focus ring of the text field is drawn by its parent
    assert reached == ["", "Raw answer", "Choose a screenshot", "", "Record the task", "Send", "Options"]


UNNAMED = """() => [...document.querySelectorAll("button, input:not([hidden]), textarea, select, summary")]
    .filter((node) => !(node.ariaLabel || node.textContent.trim() || node.labels?.[0]?.textContent.trim()))
    .map((node) => node.outerHTML)"""
# Texts with too little contrast to the nearest background, as defined by WCAG 2.
FAINT = """() => {
    const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
    const color = (css) => {
        canvas.clearRect(0, 0, 1, 1);
        canvas.fillStyle = css;
        canvas.fillRect(0, 0, 1, 1);
        return [...canvas.getImageData(0, 0, 1, 1).data];
    };
    const channel = (v) => (v / 255 <= 0.04045 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4);
    const light = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
    const ground = (node) => {
        const found = color(getComputedStyle(node).backgroundColor);
        return found[3] > 200 || !node.parentElement ? found : ground(node.parentElement);
    };
    const texts = [...document.querySelectorAll("body *")].filter((node) =>
        node.checkVisibility() && [...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim()));
    return texts.flatMap((node) => {
        const [a, b] = [light(color(getComputedStyle(node).color)), light(ground(node))].sort((x, y) => y - x);
        const contrast = (a + 0.05) / (b + 0.05);
        return contrast < 4.5 ? [`${node.textContent} ${contrast.toFixed(2)}`] : [];
    });
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1180])
def test_fits_and_is_legible(opened: Open, fake_gateway: FakeGateway, scheme: str, width: int) -> None:
    page = opened(color_scheme=scheme, viewport={"width": width, "height": 740})
    fake_gateway.will_answer(ScriptedAnswer(f"{TAP} {'长' * 200}"))
    fake_gateway.will_answer(ScriptedAnswer(status=400, error={"message": "x" * 200}))
    choose(page, "launcher.png")
    answered(page, "打开设置")
    expect(ask(page, "word " * 40).get_by_role("alert")).to_be_visible()
    page.locator("#options > summary").click()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for control in page.locator("button:visible, summary:visible").all():
        box = box_of(control)
        assert box["x"] >= 0 and box["x"] + box["width"] <= width and box["height"] >= 24, control
    assert page.evaluate(UNNAMED) == []
    assert page.evaluate(FAINT) == []
    assert page.evaluate("document.getAnimations().length") == 0


def test_animations_run_only_if_reduced_motion_is_off(opened: Open, fake_gateway: FakeGateway) -> None:
    page = opened(reduced_motion="no-preference")
    fake_gateway.will_answer(TAP)
    choose(page, "launcher.png")
    answered(page, "打开设置")
    assert page.evaluate("document.getAnimations().length") > 0


def test_is_shown_in_chinese(opened: Open, fake_gateway: FakeGateway) -> None:
    page = opened(locale="zh-CN")
    assert page.evaluate("document.documentElement.lang") == "zh-CN"
    fake_gateway.will_answer(TAP)
    step = ask(page, "打开设置")
    expect(step.locator(".chip")).to_have_text("点击 626, 200")
    untranslated = page.evaluate(
        """async () => {
            const { say } = await import("./strings.js");
            const marked = document.querySelectorAll("[data-say], [data-label], [data-hint]");
            const keys = [...marked].flatMap((node) => Object.values(node.dataset));
            return keys.filter((key) => say(key) === key || !/[\\u4e00-\\u9fff]/.test(say(key)));
        }"""
    )
    assert untranslated == []
