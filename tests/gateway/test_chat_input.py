"""The ensemble's inputs of chats and prompts."""

import asyncio
import base64
import json
from typing import Any

import pytest

from autoglm.config import LimitsConfig
from autoglm.errors import RequestError
from gateway.chat_input import ChatInput, from_messages, from_prompt
from gateway.fetch import ImageFetcher
from gateway.schema import ChatRequest

MAX_AUDIO_BYTES = 60


def read(messages: list[dict[str, Any]], **limits: int) -> ChatInput:
    body = ChatRequest.model_validate({"messages": messages})
    return asyncio.run(from_messages(body.messages, ImageFetcher(LimitsConfig(**limits), (), None), MAX_AUDIO_BYTES))


def text(content: str) -> dict[str, Any]:
    return {"type": "text", "text": content}


def image(data: bytes) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{base64.b64encode(data).decode()}"}}


def clip(data: bytes) -> dict[str, Any]:
    return {"type": "input_audio", "input_audio": {"data": base64.b64encode(data).decode(), "format": "mp3"}}


def test_a_prompt() -> None:
    assert from_prompt("打开设置") == ChatInput(prompt="打开设置", names={"PROMPT": "prompt"})


def test_text_stays_a_string_or_a_list() -> None:
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": "“x”"},
        {"role": "user", "content": [text("a"), text("b")]},
        {"role": "assistant", "content": "", "tool_calls": None, "refusal": None},
    ]
    chat = read(messages)
    assert chat.messages and "“x”" in chat.messages  # not escaped
    assert json.loads(chat.messages) == [
        {"role": "system", "content": "“x”"},
        {"role": "user", "content": [text("a"), text("b")]},
        {"role": "assistant", "content": ""},
    ]
    assert (chat.prompt, chat.images, chat.audio) == (None, [], [])


def test_files_are_separate_and_in_order() -> None:
    first = {"role": "user", "content": [image(b"1"), text("a"), clip(b"2"), image(b"3")]}
    second = {"role": "user", "content": [clip(b"4"), image(b"5")]}
    chat = read([first, {"role": "assistant", "content": "b"}, second])
    assert (chat.images, chat.audio) == ([b"1", b"3", b"5"], [b"2", b"4"])
    kinds = [[part["type"] for part in turn["content"]] for turn in json.loads(chat.messages or "")[::2]]
    assert kinds == [["image", "text", "audio", "image"], ["audio", "image"]]
    assert chat.names == {
        "MESSAGES": "messages",
        "IMAGES": "messages",
        "AUDIO": "messages",
        "prompt": "messages",
        "IMAGES[0]": "messages[0].content[0].image_url.url",
        "IMAGES[1]": "messages[0].content[3].image_url.url",
        "IMAGES[2]": "messages[2].content[1].image_url.url",
        "AUDIO[0]": "messages[0].content[2].input_audio.data",
        "AUDIO[1]": "messages[2].content[0].input_audio.data",
    }


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([image(b"1")] * 3, "messages must contain at most 2 images (got 3 or more)"),
        ([text("a"), image(bytes(200))], "messages[0].content[1].image_url.url must be "),
        ([clip(bytes(200))], "messages[0].content[0].input_audio.data must be "),
        ([{"type": "input_audio", "input_audio": {"data": "@"}}], "messages[0].content[0].input_audio.data must be "),
        ([{"type": "image_url", "image_url": {"url": "x"}}], "messages[0].content[0].image_url.url must be "),
    ],
)
def test_invalid_files(parts: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(RequestError) as caught:
        read([{"role": "user", "content": parts}], max_images=2, max_image_bytes=100)
    assert caught.value.message.startswith(message)
