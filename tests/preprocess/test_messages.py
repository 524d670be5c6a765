"""Reading MESSAGES and PROMPT: accepted forms, and the error of each invalid one."""

import base64
import json
from typing import Any

import pytest

from autoglm.config import AudioSection, LimitsConfig
from autoglm.errors import ErrorCode, RequestError
from autoglm.media.audio_file import AudioPart
from autoglm.media.image_file import ImagePart
from autoglm.preprocess.messages import TextPart, read_messages, read_user_prompt

LIMITS = LimitsConfig(max_images=3)
URL = "data:image/png;base64," + base64.b64encode(b"inline").decode()
TEXT = {"type": "text", "text": "hi"}
IMAGE = {"type": "image"}
INLINE = {"type": "image_url", "image_url": {"url": URL}}


def user(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


def rejection(messages: Any, files: list[bytes] | None = None) -> str:
    source = messages if isinstance(messages, bytes) else json.dumps(messages).encode()
    with pytest.raises(RequestError) as caught:
        read_messages(source, files or [], LIMITS)
    assert caught.value.code is ErrorCode.INVALID_ARGUMENT
    assert len(caught.value.message) < 300
    return caught.value.message


def test_strings_and_parts_are_read_in_order() -> None:
    chat = [
        {"role": "system", "content": "be short"},
        user(IMAGE, TEXT, INLINE, IMAGE),
        {"role": "assistant", "content": "<think>…</think>"},
    ]
    system, turn, assistant = read_messages(json.dumps(chat).encode(), [b"one", b"two"], LIMITS)
    assert system.parts == (TextPart("be short", "MESSAGES[0].content"),) and not system.is_list
    assert turn.is_list and turn.parts == (
        ImagePart(b"one", "IMAGES[0]"),
        TextPart("hi", "MESSAGES[1].content[1].text"),
        ImagePart(b"inline", "MESSAGES[1].content[2].image_url.url"),
        ImagePart(b"two", "IMAGES[1]"),
    )
    assert assistant.role == "assistant"


def test_null_fields_count_as_absent() -> None:
    turn = {"role": "assistant", "content": "ok", "tool_calls": None, "refusal": None}
    assert read_messages(json.dumps([turn]).encode(), [], LIMITS)[0].role == "assistant"
    part = {"type": "image_url", "image_url": {"url": URL, "detail": "high"}}
    assert read_messages(json.dumps([user(part)]).encode(), [], LIMITS)[0].images[0].data == b"inline"


def test_files_may_be_data_urls() -> None:
    assert read_messages(json.dumps([user(IMAGE)]).encode(), [URL.encode()], LIMITS)[0].images[0].data == b"inline"
    with pytest.raises(RequestError, match=r"IMAGES\[1\] must be a data URL .*\(got 'data:nothing'\)"):
        read_user_prompt(b"x", [b"raw", b"data:nothing"], LIMITS)
    with pytest.raises(RequestError, match=r"IMAGES\[0\] must be UTF-8 text"):
        read_user_prompt(b"x", [b"data:\xff"], LIMITS)


LIST = "MESSAGES must be a non-empty JSON list of messages"


@pytest.mark.parametrize("source, message", [
    (b"", f"{LIST} (got an empty text)"), (b"  \n", f"{LIST} (got an empty text)"),
    (b"{", f"{LIST} (got a syntax error at line 1, column 2)"), (b"hello", "a syntax error at line 1, column 1"),
    (b"[}", "line 1, column 2"),
    (b"\xff\xfe[", "MESSAGES must be UTF-8 text (got bytes that are not UTF-8 at offset 0)"),
    (b"[" * 200_000, "too deep"), (b"[" + b"1" * 5000 + b"]", "too long"),
    (b"[NaN]", "MESSAGES[0] must be an object with role, content (got NaN)"),
    (b"[]", f"{LIST} (got an empty JSON list)"), (b"{}", f"{LIST} (got an empty JSON object)"),
    (b"null", "MESSAGES is missing"), (b'"hi"', f"{LIST} (got 'hi')"), (b"7", f"{LIST} (got 7)"),
])  # fmt: skip
def test_messages_must_be_a_list(source: bytes, message: str) -> None:
    assert message in rejection(source)


@pytest.mark.parametrize("messages, message", [
    ([1], "MESSAGES[0] must be an object with role, content (got 1)"),
    ([{"content": "x"}], "MESSAGES[0].role is missing"),
    ([user(TEXT), {"role": "robot", "content": "x"}],
     "MESSAGES[1].role must be one of system, user, assistant (got 'robot')"),
    ([{"role": ["user"], "content": "x"}], "MESSAGES[0].role must be one of system, user, assistant (got a JSON list)"),
    ([{"role": "tool", "content": "x"}], "MESSAGES[0].role must be one of system, user, assistant (got 'tool')"),
    ([{"role": "user"}], "MESSAGES[0].content is missing"),
    ([{"role": "user", "content": 5}], "MESSAGES[0].content must be a string or a non-empty list of parts (got 5)"),
    ([{"role": "user", "content": {}}], "list of parts (got an empty JSON object)"),
    ([user()], "list of parts (got an empty JSON list)"),
    ([{"role": "user", "content": "x", "nmae": "a"}],
     "MESSAGES[0].nmae is not a known field (accepted: role, content)"),
    ([{"role": "user", "content": "x", "\ud800\n": "a"}], r"MESSAGES[0].\ud800\n is not a known field"),
    ([user(TEXT, "x")], "MESSAGES[0].content[1] must be an object whose type is one of text, image, image_url, audio"),
    ([user({"text": "x"})], "MESSAGES[0].content[0].type is missing"),
    ([user({"type": "video"})],
     "content[0].type must be one of text, image, image_url, audio, input_audio (got 'video')"),
    ([user({"type": {"a": 1}})], "input_audio (got a JSON object)"),
    ([user({"type": "text"})], "MESSAGES[0].content[0].text is missing"),
    ([user({"type": "text", "text": 3})], "MESSAGES[0].content[0].text must be a string (got 3)"),
    ([user({"type": "text", "text": "x", "extra": 1})],
     "MESSAGES[0].content[0].extra is not a known field (accepted: type, text)"),
    ([user({"type": "image", "image": URL})], "MESSAGES[0].content[0].image is not a known field (accepted: type)"),
    ([user({"type": "image_url"})], "MESSAGES[0].content[0].image_url is missing"),
    ([user({"type": "image_url", "image_url": URL})],
     "MESSAGES[0].content[0].image_url must be an object with url, detail (got 'data:image"),
    ([user({"type": "image_url", "image_url": {}})], "MESSAGES[0].content[0].image_url.url is missing"),
    ([user({"type": "image_url", "image_url": {"url": "https://x/y.png"}})],
     "image_url.url must be a data URL such as data:image/png;base64,... (got 'https://x/y.png')"),
    ([{"role": "system", "content": [INLINE]}],
     "MESSAGES[0].content[0].type must be text in a message of role system (got 'image_url')"),
    ([{"role": "user", "content": "\ud800"}],
     "MESSAGES[0].content must be valid Unicode text (got half of a surrogate pair)"),
    ([user(INLINE, INLINE, INLINE, INLINE)], "IMAGES must be at most 3 per request (got 4)"),
])  # fmt: skip
def test_the_error_names_the_field(messages: Any, message: str) -> None:
    assert message in rejection(messages)


@pytest.mark.parametrize("parts, files, message", [
    (1, 0, "IMAGES must be one element for each part of type image in MESSAGES (got 0 for 1)"), (0, 1, "got 1 for 0"),
    (2, 3, "got 3 for 2"), (3, 2, "got 2 for 3"), (4, 4, "at most 3 per request (got 4)"),
])  # fmt: skip
def test_images_and_their_parts_must_match(parts: int, files: int, message: str) -> None:
    assert message in rejection([user(TEXT, *[IMAGE] * parts)], [b"file"] * files)


def test_long_values_are_shortened_in_errors() -> None:
    assert len(rejection([{"role": "x" * 10**6, "content": "x"}])) < 200
    assert len(rejection([{"role": "user", "content": "x", "y" * 10**6: 1}])) < 200


def test_further_roles_are_accepted_if_the_template_has_them() -> None:
    chat = json.dumps([{"role": "tool", "content": "x"}]).encode()
    assert read_messages(chat, [], LIMITS, roles=("user", "tool"))[0].role == "tool"


def test_a_prompt_is_one_user_turn_with_the_images_first() -> None:
    (turn,) = read_user_prompt("打开设置".encode(), [b"one", b"two"], LIMITS)
    assert turn.role == "user" and [part.name for part in turn.parts] == ["IMAGES[0]", "IMAGES[1]", "PROMPT"]
    assert turn.texts[0].text == "打开设置"
    empty = "PROMPT must be a non-empty text unless AUDIO is given (got ''"
    for source, message in ((b"", empty), (b" \n", empty[:-1]), (b"\xff", "PROMPT must be UTF-8 text (got bytes")):
        with pytest.raises(RequestError) as caught:
            read_user_prompt(source, [], LIMITS)
        assert message in caught.value.message
    with pytest.raises(RequestError, match=r"got 4"):
        read_user_prompt(b"x", [b"f"] * 4, LIMITS)


def test_clips_are_read_in_order() -> None:
    inline = {"type": "input_audio", "input_audio": {"data": "aW5saW5l", "format": "mp3"}}
    chat = json.dumps([user({"type": "audio"}, TEXT, inline, IMAGE, {"type": "audio"})]).encode()
    (turn,) = read_messages(chat, [b"image"], LIMITS, clips=[b"one", b"data:audio/wav;base64,dHdv"])
    assert turn.clips == (
        AudioPart(b"one", "AUDIO[0]"),
        AudioPart(b"inline", "MESSAGES[0].content[2].input_audio.data"),
        AudioPart(b"two", "AUDIO[1]"),
    )
    assert [type(part) for part in turn.parts] == [AudioPart, TextPart, AudioPart, ImagePart, AudioPart]
    (turn,) = read_user_prompt(b"", [b"image"], LIMITS, clips=[b"one"])
    assert [type(part) for part in turn.parts] == [ImagePart, AudioPart]


@pytest.mark.parametrize("parts, clips, message", [
    ([{"type": "audio"}], [], "AUDIO must be one element for each part of type audio in MESSAGES (got 0 for 1)"),
    ([TEXT], [b"one"], "AUDIO must be one element for each part of type audio in MESSAGES (got 1 for 0)"),
    ([{"type": "audio"}] * 2, [b"one"] * 3, "AUDIO must be at most 2 per request (got 3)"),
    ([{"type": "input_audio", "input_audio": {"data": "&"}}], [], ".input_audio.data must be valid base64"),
    ([{"type": "input_audio", "input_audio": {}}], [], ".input_audio.data is missing"),
    ([{"type": "input_audio", "input_audio": {"data": "A" * 99}}], [], "must be at most 64 bytes (got about 74 bytes)"),
    ([{"type": "audio", "audio": "x"}], [b"one"], "MESSAGES[0].content[0].audio is not a known field (accepted: type)"),
])  # fmt: skip
def test_the_error_of_audio_names_the_field(parts: list[Any], clips: list[bytes], message: str) -> None:
    limits = AudioSection(max_audio_files=2, max_audio_bytes=64)
    with pytest.raises(RequestError) as caught:
        read_messages(json.dumps([user(*parts)]).encode(), [], LIMITS, clips=clips, audio_limits=limits)
    assert message in caught.value.message
