"""Reading MESSAGES and PROMPT: what is accepted, and how each fault is named."""

import base64
import json
from typing import Any

import pytest

from autoglm.config import AudioSection, LimitsConfig
from autoglm.errors import ErrorCode, RequestError
from autoglm.media.audio_file import AudioPart
from autoglm.media.image_file import ImagePart
from autoglm.preprocess.messages import TextPart, read_messages, read_prompt

LIMITS = LimitsConfig(max_images=3)
URL = "data:image/png;base64," + base64.b64encode(b"inline").decode()
TEXT = {"type": "text", "text": "hi"}
IMAGE = {"type": "image"}
INLINE = {"type": "image_url", "image_url": {"url": URL}}


def user(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


def refused(messages: Any, files: list[bytes] | None = None) -> str:
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
    with pytest.raises(RequestError, match=r"IMAGES\[1\]: got 'data:nothing'"):
        read_prompt(b"x", [b"raw", b"data:nothing"], LIMITS)
    with pytest.raises(RequestError, match=r"IMAGES\[0\]: .*not UTF-8"):
        read_prompt(b"x", [b"data:\xff"], LIMITS)


@pytest.mark.parametrize("source, says", [
    (b"", "MESSAGES: got ''"), (b"  \n", "MESSAGES: got"), (b"{", "MESSAGES: not JSON"), (b"hello", "not JSON"),
    (b"[}", "line 1 column 2"), (b"\xff\xfe[", "MESSAGES: got bytes that are not UTF-8 at offset 0"),
    (b"[" * 200_000, "too deep"), (b"[" + b"1" * 5000 + b"]", "too long"), (b"[NaN]", "MESSAGES[0]: got nan"),
    (b"[]", "MESSAGES: got an empty JSON list"), (b"{}", "MESSAGES: got an empty JSON object"),
    (b"null", "MESSAGES: got nothing"), (b'"hi"', "MESSAGES: got 'hi'"), (b"7", "MESSAGES: got 7"),
])  # fmt: skip
def test_what_is_not_a_list_of_messages_is_refused(source: bytes, says: str) -> None:
    assert says in refused(source)


@pytest.mark.parametrize("messages, says", [
    ([1], "MESSAGES[0]: got 1"),
    ([{"content": "x"}], "MESSAGES[0].role: got nothing; allowed: system, user, assistant"),
    ([user(TEXT), {"role": "robot", "content": "x"}], "MESSAGES[1].role: got 'robot'"),
    ([{"role": ["user"], "content": "x"}], "MESSAGES[0].role: got a JSON list"),
    ([{"role": "tool", "content": "x"}], "MESSAGES[0].role: got 'tool'"),
    ([{"role": "user"}], "MESSAGES[0].content: got nothing; allowed: a string or a non-empty list"),
    ([{"role": "user", "content": 5}], "MESSAGES[0].content: got 5"),
    ([{"role": "user", "content": {}}], "MESSAGES[0].content: got an empty JSON object"),
    ([user()], "MESSAGES[0].content: got an empty JSON list"),
    ([{"role": "user", "content": "x", "nmae": "a"}], "MESSAGES[0]: got the unknown field 'nmae'"),
    ([user(TEXT, "x")], "MESSAGES[0].content[1]: got 'x'; allowed: an object with a type"),
    ([user({"text": "x"})], "MESSAGES[0].content[0].type: got nothing; allowed: text, image, image_url, audio"),
    ([user({"type": "video"})], "MESSAGES[0].content[0].type: got 'video'"),
    ([user({"type": {"a": 1}})], "MESSAGES[0].content[0].type: got a JSON object"),
    ([user({"type": "text"})], "MESSAGES[0].content[0].text: got nothing"),
    ([user({"type": "text", "text": 3})], "MESSAGES[0].content[0].text: got 3"),
    ([user({"type": "text", "text": "x", "extra": 1})], "got the unknown field 'extra'; allowed: type, text"),
    ([user({"type": "image", "image": URL})], "MESSAGES[0].content[0]: got the unknown field 'image'"),
    ([user({"type": "image_url"})], "MESSAGES[0].content[0].image_url: got nothing"),
    ([user({"type": "image_url", "image_url": URL})], "MESSAGES[0].content[0].image_url: got 'data:image"),
    ([user({"type": "image_url", "image_url": {}})], "MESSAGES[0].content[0].image_url.url: got nothing"),
    ([user({"type": "image_url", "image_url": {"url": "https://x/y.png"}})],
     "MESSAGES[0].content[0].image_url.url: got 'https://x/y.png'; allowed: a data URL"),
    ([{"role": "system", "content": [INLINE]}], "MESSAGES[0].content[0].type: got 'image_url'; allowed: text"),
    ([{"role": "user", "content": "\ud800"}], "MESSAGES[0].content: got half of a surrogate pair"),
    ([user(INLINE, INLINE, INLINE, INLINE)], "IMAGES: got 4 images; allowed: at most 3"),
])  # fmt: skip
def test_each_fault_is_named(messages: Any, says: str) -> None:
    assert says in refused(messages)


@pytest.mark.parametrize("parts, files, says", [
    (1, 0, "0 images for 1 parts"), (0, 1, "1 images for 0 parts"), (2, 3, "3 images for 2 parts"),
    (3, 2, "2 images for 3 parts"), (4, 4, "4 images; allowed: at most 3"),
])  # fmt: skip
def test_images_and_their_parts_must_match(parts: int, files: int, says: str) -> None:
    assert says in refused([user(TEXT, *[IMAGE] * parts)], [b"file"] * files)


def test_long_values_are_not_repeated_in_messages() -> None:
    assert len(refused([{"role": "x" * 10**6, "content": "x"}])) < 200
    assert len(refused([{"role": "user", "content": "x", "y" * 10**6: 1}])) < 200


def test_further_roles_are_accepted_where_the_template_knows_them() -> None:
    chat = json.dumps([{"role": "tool", "content": "x"}]).encode()
    assert read_messages(chat, [], LIMITS, ("user", "tool"))[0].role == "tool"


def test_a_prompt_is_one_user_turn_with_the_images_first() -> None:
    (turn,) = read_prompt("打开设置".encode(), [b"one", b"two"], LIMITS)
    assert turn.role == "user" and [part.name for part in turn.parts] == ["IMAGES[0]", "IMAGES[1]", "PROMPT"]
    assert turn.texts[0].text == "打开设置"
    for source, says in ((b"", "PROMPT: got ''"), (b" \n", "PROMPT: got"), (b"\xff", "PROMPT: got bytes")):
        with pytest.raises(RequestError) as caught:
            read_prompt(source, [], LIMITS)
        assert says in caught.value.message
    with pytest.raises(RequestError, match="4 images"):
        read_prompt(b"x", [b"f"] * 4, LIMITS)


def test_sound_is_read_in_order() -> None:
    inline = {"type": "input_audio", "input_audio": {"data": "aW5saW5l", "format": "mp3"}}
    chat = json.dumps([user({"type": "audio"}, TEXT, inline, IMAGE, {"type": "audio"})]).encode()
    (turn,) = read_messages(chat, [b"image"], LIMITS, sounds=[b"one", b"data:audio/wav;base64,dHdv"])
    assert turn.sounds == (
        AudioPart(b"one", "AUDIO[0]"),
        AudioPart(b"inline", "MESSAGES[0].content[2].input_audio.data"),
        AudioPart(b"two", "AUDIO[1]"),
    )
    assert [type(part) for part in turn.parts] == [AudioPart, TextPart, AudioPart, ImagePart, AudioPart]
    (turn,) = read_prompt(b"", [b"image"], LIMITS, [b"one"])
    assert [type(part) for part in turn.parts] == [ImagePart, AudioPart]


@pytest.mark.parametrize("parts, sounds, says", [
    ([{"type": "audio"}], [], "AUDIO: got 0 files for 1 parts of type audio"),
    ([TEXT], [b"one"], "AUDIO: got 1 files for 0 parts of type audio"),
    ([{"type": "audio"}] * 2, [b"one"] * 3, "AUDIO: got 3 files; allowed: at most 2 in one request"),
    ([{"type": "input_audio", "input_audio": {"data": "&"}}], [], ".input_audio.data: got broken base64"),
    ([{"type": "input_audio", "input_audio": {}}], [], ".input_audio.data: got nothing; allowed: a file in base64"),
    ([{"type": "input_audio", "input_audio": {"data": "A" * 99}}], [], "got about 74 bytes; allowed: at most 64"),
    ([{"type": "audio", "audio": "x"}], [b"one"], "MESSAGES[0].content[0]: got the unknown field 'audio'"),
])  # fmt: skip
def test_each_fault_of_sound_is_named(parts: list[Any], sounds: list[bytes], says: str) -> None:
    limits = AudioSection(max_audio_files=2, max_audio_bytes=64)
    with pytest.raises(RequestError) as caught:
        read_messages(json.dumps([user(*parts)]).encode(), [], LIMITS, sounds=sounds, audio=limits)
    assert says in caught.value.message
