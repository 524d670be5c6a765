"""Inputs other than text: screenshots, recordings, the API key."""

import base64
import io
import wave
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from tests.gateway.playground.fake_gateway import FakeGateway, ScriptedAnswer
from tests.gateway.playground.using import BACK, SAMPLES, TAP, Open, answered, ask


def test_records_speech(page: Page, fake_gateway: FakeGateway) -> None:
    def record() -> None:
        page.get_by_role("button", name="Record the task").click()
        page.wait_for_timeout(600)
        page.get_by_role("button", name="Stop recording").click()
        expect(page.locator("#speech")).to_contain_text("Speech, ")

    record()
    fake_gateway.will_answer(ScriptedAnswer(TAP, transcripts=["打开设置"]))
    page.get_by_role("button", name="Send").click()
    expect(page.locator(".chip")).to_be_visible()
    expect(page.locator("#speech")).to_be_hidden()
    expect(page.locator(".transcript")).to_have_text("Transcript: “打开设置”")
    [part] = fake_gateway.requests[0].body["messages"][0]["content"]
    assert (part["type"], part["input_audio"]["format"]) == ("input_audio", "wav")
    with wave.open(io.BytesIO(base64.b64decode(part["input_audio"]["data"]))) as recording:
        assert (recording.getframerate(), recording.getnchannels(), recording.getsampwidth()) == (16000, 1, 2)
        assert 0.3 < recording.getnframes() / 16000 < 3
    record()
    fake_gateway.will_answer(
        ScriptedAnswer(
            status=400, error={"message": "messages must not contain audio: this server has no speech encoder"}
        )
    )
    step = ask(page, "")
    expect(step.get_by_role("alert")).to_contain_text(
        "The server does not support speech. messages must not contain audio: "
    )
    expect(page.locator("#speech")).to_be_hidden()
    record()
    page.get_by_role("button", name="Remove the recording").click()
    expect(page.locator("#speech")).to_be_hidden()
    page.get_by_role("button", name="Record the task").click()
    page.wait_for_timeout(600)
    fake_gateway.will_answer(BACK)
    page.get_by_role("button", name="Send").click()  # also ends the recording
    expect(page.locator(".step")).to_have_count(3)
    expect(page.get_by_role("button", name="Record the task")).to_be_visible()
    expect(page.locator(".chip")).to_have_count(2)
    assert "input_audio" in {part["type"] for part in fake_gateway.requests[-1].body["messages"][-1]["content"]}


@pytest.mark.parametrize("event", ["paste", "drop"])
def test_screenshots_can_be_pasted_and_dropped(page: Page, event: str) -> None:
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


def test_files_that_cannot_be_read(page: Page, tmp_path: Path) -> None:
    (tmp_path / "notes.png").write_text("no image")
    page.set_input_files("#file", tmp_path / "notes.png")
    expect(page.locator("#notice")).to_contain_text("notes.png is not an image or audio file")
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Send").click()
    expect(page.locator("#notice")).to_have_text("Type or record a task.")


def test_the_api_key_is_stored_for_this_tab_only(opened: Open, fake_gateway: FakeGateway) -> None:
    fake_gateway.key = "secret"
    page = opened()
    expect(page.locator("#served")).to_have_text("API key required")
    step = ask(page, "go")
    expect(step.get_by_role("alert")).to_contain_text("The API key was not accepted.")
    page.get_by_label("API key").fill("secret")
    page.get_by_label("API key").press("Tab")
    expect(page.locator("#served")).to_have_text("autoglm-phone-9b")
    fake_gateway.will_answer(BACK)
    answered(page, "go")
    assert fake_gateway.requests[0].key == "Bearer secret"
    page.reload()
    expect(page.locator("#served")).to_have_text("autoglm-phone-9b")
    assert page.evaluate("[localStorage.length, document.cookie]") == [0, ""]
    other = page.context.new_page()
    other.goto(fake_gateway.url)
    expect(other.locator("#served")).to_have_text("API key required")
