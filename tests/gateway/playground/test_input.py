"""What goes in beside words: screenshots, speech, the API key."""

from __future__ import annotations

import base64
import io
import wave
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from tests.gateway.playground.stand_in import Answer, StandIn
from tests.gateway.playground.using import BACK, SAMPLES, TAP, Open, answered, ask


def test_records_speech(page: Page, server: StandIn) -> None:
    def record() -> None:
        page.get_by_role("button", name="Record the task").click()
        page.wait_for_timeout(600)
        page.get_by_role("button", name="Stop recording").click()
        expect(page.locator("#speech")).to_contain_text("Speech, ")

    record()
    server.will(Answer(TAP, transcripts=["打开设置"]))
    page.get_by_role("button", name="Send").click()
    expect(page.locator(".chip")).to_be_visible()
    expect(page.locator("#speech")).to_be_hidden()
    expect(page.locator(".heard")).to_have_text("Heard: “打开设置”")
    [part] = server.asked[0].body["messages"][0]["content"]
    assert (part["type"], part["input_audio"]["format"]) == ("input_audio", "wav")
    with wave.open(io.BytesIO(base64.b64decode(part["input_audio"]["data"]))) as sound:
        assert (sound.getframerate(), sound.getnchannels(), sound.getsampwidth()) == (16000, 1, 2)
        assert 0.3 < sound.getnframes() / 16000 < 3
    record()
    server.will(Answer(status=400, error={"message": "AUDIO: this server has no speech encoder"}))
    step = ask(page, "")
    expect(step.get_by_role("alert")).to_contain_text("The server does not take speech. AUDIO: ")
    expect(page.locator("#speech")).to_be_hidden()
    record()
    page.get_by_role("button", name="Remove the recording").click()
    expect(page.locator("#speech")).to_be_hidden()
    page.get_by_role("button", name="Record the task").click()
    page.wait_for_timeout(600)
    server.will(BACK)
    page.get_by_role("button", name="Send").click()  # ends the recording first
    expect(page.locator(".step")).to_have_count(3)
    expect(page.get_by_role("button", name="Record the task")).to_be_visible()
    expect(page.locator(".chip")).to_have_count(2)
    assert "input_audio" in {part["type"] for part in server.asked[-1].body["messages"][-1]["content"]}


@pytest.mark.parametrize("event", ["paste", "drop"])
def test_takes_screenshots_that_are_pasted_or_dropped(page: Page, event: str) -> None:
    data = base64.b64encode((SAMPLES / "form.png").read_bytes()).decode()
    page.evaluate(
        """([data, event]) => {
            const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
            const transfer = new DataTransfer();
            transfer.items.add(new File([bytes], "form.png", { type: "image/png" }));
            const happened = event === "drop"
                ? new DragEvent("drop", { dataTransfer: transfer, bubbles: true, cancelable: true })
                : new ClipboardEvent("paste", { clipboardData: transfer, bubbles: true });
            document.body.dispatchEvent(happened);
        }""",
        [data, event],
    )
    expect(page.locator("#facts")).to_have_text("1080 × 1920")


def test_says_what_it_cannot_read(page: Page, tmp_path: Path) -> None:
    (tmp_path / "notes.png").write_text("no image")
    page.set_input_files("#file", tmp_path / "notes.png")
    expect(page.locator("#notice")).to_contain_text("notes.png is neither an image nor a sound")
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Send").click()
    expect(page.locator("#notice")).to_have_text("Type or record what is to be done.")


def test_keeps_the_key_for_this_tab_only(opened: Open, server: StandIn) -> None:
    server.key = "secret"
    page = opened()
    expect(page.locator("#served")).to_have_text("API key needed")
    step = ask(page, "go")
    expect(step.get_by_role("alert")).to_contain_text("The API key was not accepted.")
    page.get_by_label("API key").fill("secret")
    page.get_by_label("API key").press("Tab")
    expect(page.locator("#served")).to_have_text("autoglm-phone-9b")
    server.will(BACK)
    answered(page, "go")
    assert server.asked[0].key == "Bearer secret"
    page.reload()
    expect(page.locator("#served")).to_have_text("autoglm-phone-9b")
    assert page.evaluate("[localStorage.length, document.cookie]") == [0, ""]
    other = page.context.new_page()
    other.goto(server.url)
    expect(other.locator("#served")).to_have_text("API key needed")
