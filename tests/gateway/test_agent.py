"""Requests and parsing of Open-AutoGLM (its phone_agent/model/client.py and agent.py)."""

import base64
import json
from typing import Any

import pytest
from openai import OpenAI

from benchmarks.screens import random_screen
from tests.gateway.test_openai import MODEL, SAMPLES

SYSTEM = "今天的日期是: {date}\n你是一个智能体分析专家，可以根据操作历史和当前状态图执行一系列操作来完成任务。" * 20
DOUBLED_TAGS = (
    "<think><think>“设置”在屏幕上，点击它。</think>\n"
    '<answer></think><answer>do(action="Tap", element=[626,200])</answer>'
)


def request(openai: OpenAI, messages: list[Any], **options: Any) -> str:
    """One step of the agent: its options, and its loop over the chunks."""
    stream = openai.chat.completions.create(
        messages=messages, model=MODEL, max_tokens=3000, temperature=0.0, top_p=0.85, frequency_penalty=0.2,
        extra_body={}, stream=True, **options,
    )  # fmt: skip
    text = ""
    for chunk in stream:
        if len(chunk.choices) == 0:
            continue
        if chunk.choices[0].delta.content is not None:
            text += chunk.choices[0].delta.content
    return text


def action(text: str) -> str:
    """The agent's parsing: from the first mark that the text contains."""
    for mark in ("finish(message=", "do(action="):
        if mark in text:
            return mark + text.split(mark, 1)[1]
    return text.split("<answer>", 1)[1]


def user(text: str, image: bytes | None) -> dict[str, Any]:
    parts: list[dict[str, Any]] = [{"type": "text", "text": text}]
    if image:
        url = f"data:image/png;base64,{base64.b64encode(image).decode()}"
        parts.insert(0, {"type": "image_url", "image_url": {"url": url}})
    return {"role": "user", "content": parts}


@pytest.mark.parametrize("sample", json.loads((SAMPLES / "samples.json").read_text(encoding="utf-8")))
def test_answers_can_be_parsed(openai: OpenAI, sample: dict[str, str]) -> None:
    image = (SAMPLES / sample["image"]).read_bytes()
    text = request(openai, [user(f"{sample['task']}", image)])
    assert "</answer>" not in text
    assert "<think>" in text  # the thought is part of the content
    assert action(text).endswith(")")


def test_a_second_step_with_the_agents_history(openai: OpenAI) -> None:
    """The date in the system prompt has changed, the first image is removed, and tags are doubled."""
    image = (SAMPLES / "settings.png").read_bytes()
    for date in ("2026年11月22日", "2026年11月23日"):
        messages = [
            {"role": "system", "content": SYSTEM.format(date=date)},
            user('打开设置\n\n{"current_app": "System Home"}', None),
            {"role": "assistant", "content": DOUBLED_TAGS},
            user('** Screen Info **\n\n{"current_app": "Settings"}', image),
        ]
        assert "</answer>" not in request(openai, messages)


def test_a_screenshot_of_more_than_a_megabyte(openai: OpenAI) -> None:
    image = random_screen(1) + bytes(1_200_000)  # data after the end of a PNG is ignored
    messages: list[Any] = [user("go", image)]
    # Resized to be small: the demo runs on the CPU.
    answer = openai.chat.completions.create(
        model=MODEL, messages=messages, max_tokens=2, extra_body={"max_pixels": 200_000}
    )
    assert answer.usage and answer.usage.completion_tokens <= 2
