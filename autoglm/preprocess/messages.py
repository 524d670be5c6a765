"""Reads a request's chat: MESSAGES (an OpenAI-style list as JSON) or PROMPT, with their images and audio clips."""

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from autoglm.config import AudioSection, LimitsConfig
from autoglm.errors import RequestError, Verbatim, invalid, printable
from autoglm.media.audio_file import AudioPart
from autoglm.media.image_file import ImagePart
from autoglm.media.payload import decode_base64, decode_data_url

ROLES = ("system", "user", "assistant")
PART_TYPES = "text, image, image_url, audio, input_audio"


@dataclass(frozen=True)
class TextPart:
    text: str
    name: str


Part = TextPart | ImagePart | AudioPart


@dataclass(frozen=True)
class Message:
    """One turn. `is_list`: its content is a list of parts, which templates may render differently from a string."""

    role: str
    parts: tuple[Part, ...]
    is_list: bool

    @property
    def images(self) -> tuple[ImagePart, ...]:
        return tuple(part for part in self.parts if isinstance(part, ImagePart))

    @property
    def clips(self) -> tuple[AudioPart, ...]:
        return tuple(part for part in self.parts if isinstance(part, AudioPart))

    @property
    def texts(self) -> tuple[TextPart, ...]:
        return tuple(part for part in self.parts if isinstance(part, TextPart))


def read_messages(
    source: bytes,
    images: Sequence[bytes],
    limits: LimitsConfig,
    *,
    roles: Collection[str] = ROLES,
    clips: Sequence[bytes] = (),
    audio_limits: AudioSection | None = None,
) -> list[Message]:
    """Parse MESSAGES.

    Args:
        source: UTF-8 JSON text.
        images: the elements of IMAGES, in the order of the parts of type image.
        roles: the roles that the checkpoint's template supports.
        clips: the elements of AUDIO, in the order of the parts of type audio.
        audio_limits: None uses the defaults.

    Raises:
        RequestError: the chat is malformed (the message names the field, such as `MESSAGES[2].content[0].type`), or
            the number of images or clips differs from the number of their parts or exceeds its limit.
    """
    media = _Media(images, limits, clips, audio_limits or AudioSection())
    turns = _parse_json(source)
    if not isinstance(turns, list) or not turns:
        raise _wrong_type("MESSAGES", turns, "a non-empty JSON list of messages")
    messages = [_read_message(turn, f"MESSAGES[{i}]", media, roles) for i, turn in enumerate(turns)]
    _check_all_used("IMAGES", len(images), media.num_images, "image")
    _check_all_used("AUDIO", len(clips), media.num_clips, "audio")
    media.check_counts(sum(len(turn.images) for turn in messages), sum(len(turn.clips) for turn in messages))
    return messages


def read_user_prompt(
    source: bytes,
    images: Sequence[bytes],
    limits: LimitsConfig,
    *,
    clips: Sequence[bytes] = (),
    audio_limits: AudioSection | None = None,
) -> list[Message]:
    """One user turn from PROMPT: the images, the clips, then the text, which may be empty if there are clips.

    Raises:
        RequestError: the text is empty or not UTF-8, or there are too many images or clips.
    """
    media = _Media(images, limits, clips, audio_limits or AudioSection())
    text = _decode(source, "PROMPT")
    if not text.strip() and not clips:
        raise invalid("PROMPT", text, "a non-empty text unless AUDIO is given")
    parts: list[Part] = [media.take_image() for _ in images]
    parts += [media.take_clip() for _ in clips]
    parts += [TextPart(text, "PROMPT")] if text.strip() else []
    return [Message("user", tuple(parts), is_list=True)]


class _Media:
    """The elements of IMAGES and AUDIO, taken in order. More may be taken than there are; the caller checks that."""

    def __init__(
        self, images: Sequence[bytes], limits: LimitsConfig, clips: Sequence[bytes], audio_limits: AudioSection
    ) -> None:
        self.images = images
        self.limits = limits
        self.clips = clips
        self.audio_limits = audio_limits
        self.num_images = 0  # taken so far
        self.num_clips = 0
        self.check_counts(len(images), len(clips))

    def check_counts(self, images: int, clips: int) -> None:
        most_images, most_clips = self.limits.max_images, self.audio_limits.max_audio_files
        if images > most_images:
            raise invalid("IMAGES", images, f"at most {most_images} per request")
        if clips > most_clips:
            raise invalid("AUDIO", clips, f"at most {most_clips} per request")

    def take_image(self) -> ImagePart:
        i, self.num_images = self.num_images, self.num_images + 1
        name = f"IMAGES[{i}]"
        file = self.images[i] if i < len(self.images) else b""
        if file[:5] == b"data:":  # JSON requests to Triton cannot hold raw bytes
            file = decode_data_url(_decode(file, name), "image", self.limits.max_image_bytes, name)
        return ImagePart(file, name)

    def take_clip(self) -> AudioPart:
        i, self.num_clips = self.num_clips, self.num_clips + 1
        name = f"AUDIO[{i}]"
        file = self.clips[i] if i < len(self.clips) else b""
        if file[:5] == b"data:":
            file = decode_data_url(_decode(file, name), "audio", self.audio_limits.max_audio_bytes, name)
        return AudioPart(file, name)


def _check_all_used(name: str, elements: int, parts: int, kind: str) -> None:
    if elements != parts:
        accepted = f"one element for each part of type {kind} in MESSAGES"
        raise invalid(name, Verbatim(f"{elements} for {parts}"), accepted)


def _decode(source: bytes, name: str) -> str:
    try:
        return source.decode("utf-8")
    except UnicodeDecodeError as error:
        got = Verbatim(f"bytes that are not UTF-8 at offset {error.start}")
        raise invalid(name, got, "UTF-8 text") from None


def _parse_json(source: bytes) -> Any:
    text = _decode(source, "MESSAGES")
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        got = f"a syntax error at line {error.lineno}, column {error.colno}" if text.strip() else "an empty text"
    except (ValueError, RecursionError):  # a number with thousands of digits, or thousands of brackets
        got = "a number that is too long or nesting that is too deep"
    raise invalid("MESSAGES", Verbatim(got), "a non-empty JSON list of messages")


def _read_message(turn: Any, name: str, media: _Media, roles: Collection[str]) -> Message:
    # OpenAI's client sends the empty fields of answers back: null is the same as absent.
    turn = _fields(turn, name, ("role", "content"))
    role, content = turn.get("role"), turn.get("content")
    if not isinstance(role, str) or role not in roles:
        raise _wrong_type(f"{name}.role", role, f"one of {', '.join(roles)}")
    if isinstance(content, str):
        return Message(role, (_text(content, f"{name}.content"),), is_list=False)
    if not isinstance(content, list) or not content:
        raise _wrong_type(f"{name}.content", content, "a string or a non-empty list of parts")
    parts = tuple(_read_part(part, f"{name}.content[{j}]", media) for j, part in enumerate(content))
    if role != "user":
        for j, part in enumerate(parts):
            if not isinstance(part, TextPart):
                raise invalid(f"{name}.content[{j}].type", content[j]["type"], f"text in a message of role {role}")
    return Message(role, parts, is_list=True)


def _read_part(part: Any, name: str, media: _Media) -> Part:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text":
        text = _fields(part, name, ("type", "text")).get("text")
        if not isinstance(text, str):
            raise _wrong_type(f"{name}.text", text, "a string")
        return _text(text, f"{name}.text")
    if kind == "image":
        _fields(part, name, ("type",))
        return media.take_image()
    if kind == "image_url":
        link = _fields(part, name, ("type", "image_url")).get("image_url")
        url = _fields(link, f"{name}.image_url", ("url", "detail")).get("url")
        if not isinstance(url, str):
            raise _wrong_type(f"{name}.image_url.url", url, "a data URL")
        where = f"{name}.image_url.url"
        return ImagePart(decode_data_url(url, "image", media.limits.max_image_bytes, where), where)
    if kind == "audio":
        _fields(part, name, ("type",))
        return media.take_clip()
    if kind == "input_audio":
        clip = _fields(part, name, ("type", "input_audio")).get("input_audio")
        where = f"{name}.input_audio.data"
        data = _fields(clip, f"{name}.input_audio", ("data", "format")).get("data")  # the format is read from the file
        if not isinstance(data, str):
            raise _wrong_type(where, data, "a file in base64")
        return AudioPart(decode_base64(data, media.audio_limits.max_audio_bytes, where), where)
    if not isinstance(part, dict):
        raise _wrong_type(name, part, f"an object whose type is one of {PART_TYPES}")
    raise _wrong_type(f"{name}.type", kind, f"one of {PART_TYPES}")


def _text(text: str, name: str) -> TextPart:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise invalid(name, Verbatim("half of a surrogate pair"), "valid Unicode text") from None
    return TextPart(text, name)


def _fields(value: Any, name: str, known: tuple[str, ...]) -> dict[str, Any]:
    """The fields of an object that are not null.

    Raises:
        RequestError: it is not an object, or has another field.
    """
    if not isinstance(value, dict):
        raise _wrong_type(name, value, f"an object with {', '.join(known)}")
    fields = {key: field for key, field in value.items() if field is not None}
    for key in fields:
        if key not in known:
            raise RequestError(f"{name}.{printable(key)} is not a known field (accepted: {', '.join(known)})")
    return fields


def _wrong_type(name: str, value: Any, accepted: str) -> RequestError:
    if value is None:
        return RequestError(f"{name} is missing")
    if isinstance(value, (dict, list)):
        value = Verbatim(f"{'a' if value else 'an empty'} JSON {'object' if isinstance(value, dict) else 'list'}")
    return invalid(name, value, accepted)
