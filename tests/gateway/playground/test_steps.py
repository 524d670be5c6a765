"""Steps of a task: requests, display, and ends."""

import base64
import re
from typing import Any

import pytest
from playwright.sync_api import Page, expect

from tests.gateway.playground.fake_gateway import FakeGateway, ScriptedAnswer
from tests.gateway.playground.using import BACK, SAMPLES, TAP, answered, ask, box_of, choose


def text_of(message: dict[str, Any]) -> str:
    [part] = [part for part in message["content"] if part["type"] == "text"]
    return str(part["text"])


def test_streams_the_thought_and_draws_the_tap(page: Page, fake_gateway: FakeGateway) -> None:
    answer = fake_gateway.will_answer(ScriptedAnswer(TAP, pause=12))
    choose(page, "launcher.png")
    step = ask(page, "打开设置")
    expect(step.locator(".thought")).to_have_text("“设置”在")
    expect(page.get_by_role("button", name="Stop")).to_be_visible()
    expect(step.locator(".chip")).to_have_count(0)
    answer.resume.set()
    expect(step.locator(".thought")).to_have_text("“设置”在屏幕上，点击它。")
    expect(step.locator(".chip")).to_have_text("Tap 626, 200")
    expect(page.locator("#facts")).to_have_text("1080 × 2400 · pixel 676, 480")
    screen, dot = box_of(page.locator("#shot")), box_of(page.locator("#marks .ink.solid"))
    assert dot["x"] + dot["width"] / 2 == pytest.approx(screen["x"] + 0.626 * screen["width"], abs=1)
    assert dot["y"] + dot["height"] / 2 == pytest.approx(screen["y"] + 0.200 * screen["height"], abs=1)
    expect(page.get_by_role("button", name="Send")).to_be_visible()
    expect(page.locator("#status")).to_have_text("Tap 626, 200")


def test_requests_have_the_format_of_phone_agents(page: Page, fake_gateway: FakeGateway) -> None:
    page.locator("#options > summary").click()
    page.get_by_label("Current app").fill("设置")
    page.get_by_label("System prompt").fill("今天是 2026-11-22")
    page.get_by_label("seed").fill("7")
    steps = (TAP, "launcher.png", "打开设置"), (BACK, "settings.png", ""), (BACK, "form.png", "再返回")
    for answer, image, words in steps:
        fake_gateway.will_answer(answer)
        choose(page, image)
        answered(page, words)
    first, _, third = (request.body for request in fake_gateway.requests)
    assert first.pop("messages")[0] == {"role": "system", "content": "今天是 2026-11-22"}
    assert first == {
        **{"model": "autoglm-phone-9b", "stream": True, "stream_options": {"include_usage": True}},
        **{"temperature": 0, "top_p": 0.85, "frequency_penalty": 0.2, "seed": 7},
    }
    assert [message["role"] for message in third["messages"]] == ["system", *["user", "assistant"] * 2, "user"]
    _, task, did, then, back, last = third["messages"]
    assert task == {"role": "user", "content": [{"type": "text", "text": '打开设置\n\n{"current_app": "设置"}'}]}
    assert text_of(then) == '** Screen Info **\n\n{"current_app": "设置"}'
    assert text_of(last) == '再返回\n\n{"current_app": "设置"}'
    thought, action = "<think>“设置”在屏幕上，点击它。</think><answer>", 'do(action="Tap", element=[626,200])'
    assert did["content"] == f"<think>{thought}</think><answer>{action}</answer>"  # Open-AutoGLM doubles the tags
    assert back["content"] == '<think><think>Go back.</think>\n<answer></think><answer>do(action="Back")</answer>'
    assert [part["type"] for part in last["content"]] == ["image_url", "text"]
    picture = base64.b64decode(last["content"][0]["image_url"]["url"].removeprefix("data:image/png;base64,"))
    assert picture == (SAMPLES / "form.png").read_bytes()


DRAWN = [
    ('do(action="Swipe", start=[800,500], end=[200,500])', "Swipe 800, 500 → 200, 500", ""),
    ('do(action="Double Tap", element=[1,2])', "Double tap 1, 2", ""),
    ('do(action="Long Press", element=[999,999])', "Long press 999, 999", ""),
    ('do(action="Tap", element=[5,6], message="Pay 12")', "Tap 5, 6 · Pay 12", "Pay 12"),
    ('do(action="Type", text="hello <b>world</b>")', "Type hello <b>world</b>", "Type hello <b>world</b>"),
    ('do(action="Type_Name", text="张三")', "Type a name 张三", "Type a name 张三"),
    ('do(action="Launch", app="京东")', "Launch 京东", "Launch 京东"),
    ('do(action="Back")', "Back", "Back"),
    ('do(action="Home")', "Home", "Home"),
    ('do(action="Wait", duration="3 seconds")', "Wait 3 seconds", "Wait 3 seconds"),
    ('do(action="Take_over", message="请登录")', "Your turn 请登录", "Your turn 请登录"),
    ('do(action="Note", message="True")', "Note the page", "Note the page"),
    ('do(action="Call_API", instruction="总结")', "Summarise 总结", "Summarise 总结"),
    ('do(action="Interact")', "Which one?", "Which one?"),
    ('finish(message="All done.")', "Finished All done.", "Finished All done."),
]


def test_draws_every_action(page: Page, fake_gateway: FakeGateway) -> None:
    choose(page, "cards.png")
    for text, chip, banner in DRAWN:
        fake_gateway.will_answer(f"<think>x</think><answer>{text}")
        step = answered(page, "go")
        expect(step.locator(".chip")).to_have_text(chip)
        expect(page.locator("#banner")).to_have_text(banner)
        assert page.locator("#banner").is_visible() == bool(banner)
        assert bool(page.locator("#marks > *").count()) == ("=[" in text)
        href = step.locator(".chip use").get_attribute("href")
        assert page.locator(f"symbol{href}").count() == 1, href


def test_goes_back_to_earlier_steps(page: Page, fake_gateway: FakeGateway) -> None:
    for text, image in ((TAP, "launcher.png"), (BACK, "settings.png")):
        fake_gateway.will_answer(text)
        choose(page, image)
        answered(page, "go")
    expect(page.locator("#shot")).to_have_attribute("alt", "Screenshot settings.png")
    page.get_by_role("button", name="Show step 1").click()
    expect(page.locator("#shot")).to_have_attribute("alt", "Screenshot launcher.png")
    expect(page.locator("#facts")).to_contain_text("676, 480")
    expect(page.locator(".thumb[aria-current=true]")).to_have_count(1)
    page.get_by_role("button", name="New task").click()
    expect(page.locator(".step")).to_have_count(0)
    fake_gateway.will_answer(BACK)
    answered(page, "again")
    assert [message["role"] for message in fake_gateway.requests[-1].body["messages"]] == ["user"]


def test_shows_times_and_stages(page: Page, fake_gateway: FakeGateway) -> None:
    fake_gateway.will_answer(TAP)
    step = answered(page, "go")
    figures = step.locator(".figures").first.inner_text()
    expected = r"[\d.]+ ms first token [\d.]+ ms total 199 tokens/s 3391 in \(3072 cached\) 20 out"
    assert re.fullmatch(expected, " ".join(figures.split()))
    legend = " ".join(step.locator(".legend").inner_text().split())
    assert legend == "ms 2.1 queue 9 preprocess 38 vision 21 prefill 96 decode"
    widths = {i.get_attribute("class"): box_of(i)["width"] for i in step.locator(".stages i").all()}
    assert widths["decode"] / widths["vision"] == pytest.approx(95.7 / 38.4, rel=0.1)
    fake_gateway.will_answer(ScriptedAnswer(TAP, usage={"prompt_tokens": 1, "completion_tokens": 1}))
    assert answered(page, "go").locator(".stages").count() == 0
    fake_gateway.will_answer(ScriptedAnswer(TAP, usage=None))
    expect(answered(page, "go").locator(".figures")).to_contain_text("total")


@pytest.mark.parametrize("way", ["button", "Escape"])
def test_stop_closes_the_connection(page: Page, fake_gateway: FakeGateway, way: str) -> None:
    answer = fake_gateway.will_answer(ScriptedAnswer(TAP, pause=12))
    choose(page, "launcher.png")
    step = ask(page, "打开设置")
    expect(step.locator(".thought")).to_have_text("“设置”在")
    page.get_by_role("button", name="Stop").click() if way == "button" else page.keyboard.press("Escape")
    assert answer.disconnected.wait(5)
    expect(step.locator(".warning")).to_have_text("Stopped")
    assert page.input_value("#words") == "打开设置"
    fake_gateway.will_answer(BACK)
    answered(page, "返回")
    assert len(fake_gateway.requests[-1].body["messages"]) == 1  # a stopped step is not part of the history


def test_a_new_task_stops_the_old_one(page: Page, fake_gateway: FakeGateway) -> None:
    answer = fake_gateway.will_answer(ScriptedAnswer(TAP, pause=12))
    step = ask(page, "打开设置")
    expect(step.locator(".thought")).not_to_be_empty()
    page.get_by_role("button", name="New task").click()
    assert answer.disconnected.wait(5)
    expect(page.locator(".step")).to_have_count(0)
    fake_gateway.will_answer(BACK)
    expect(answered(page, "返回").locator(".chip")).to_have_text("Back")


ERRORS = [
    (
        ScriptedAnswer(status=400, error={"message": "top_k must be between 0 and 2147483647 (got -1)"}),
        "The server refused the request. top_k must be between 0 and 2147483647 (got -1)",
    ),
    (
        ScriptedAnswer(status=413, error={"message": "the body must be smaller"}),
        "The request is too large. the body must be smaller",
    ),
    (
        ScriptedAnswer(status=503, error={"message": "the queue is full"}, headers={"Retry-After": "2"}),
        "The server is busy. Try again in 2 s. the queue is full",
    ),
    (
        ScriptedAnswer("<think>so", error={"message": "INTERNAL: lost", "code": 500}),
        "The server failed. INTERNAL: lost",
    ),
    (ScriptedAnswer("<think>so", broken=True), "The server cannot be reached. the stream ended before [DONE]"),
]


@pytest.mark.parametrize(("answer", "shown"), ERRORS, ids=[shown for _, shown in ERRORS])
def test_errors_are_shown_and_the_task_is_kept(
    page: Page, fake_gateway: FakeGateway, answer: ScriptedAnswer, shown: str
) -> None:
    fake_gateway.will_answer(answer)
    step = ask(page, "打开设置")
    expect(step.get_by_role("alert")).to_have_text(shown)
    assert page.input_value("#words") == "打开设置"
    expect(page.get_by_role("button", name="Send")).to_be_visible()


def test_answers_without_an_action(page: Page, fake_gateway: FakeGateway) -> None:
    fake_gateway.will_answer(ScriptedAnswer("<think>I do not know", finish_reason="length"))
    step = answered(page, "go")
    expect(step.locator(".warning")).to_have_text("No valid action The answer was cut off at the token limit.")
    step.get_by_text("Raw answer").click()
    expect(step.locator("pre")).to_have_text("<think>I do not know")
