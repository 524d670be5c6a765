"""Reading a request's chat: MESSAGES (an OpenAI-style list as JSON) or PROMPT, with images and sound they refer to."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from autoglm.config import AudioSection, LimitsConfig
from autoglm.errors import Exact, RequestError, invalid
from autoglm.media.audio_file import AudioPart, decode_audio_url
from autoglm.media.image_file import ImagePart, decode_base64, decode_data_url

ROLES = ("system", "user", "assistant")
PART_TYPES = "text, image, image_url, audio or input_audio"


@dataclass(frozen=True)
class TextPart:
    text: str
    name: str


Part = TextPart | ImagePart | AudioPart


@dataclass(frozen=True)
class Message:
    """One turn. `is_list` tells whether its content came as a list of parts; templates may treat that differently."""

    role: str
    parts: tuple[Part, ...]
    is_list: bool

    @property
    def images(self) -> tuple[ImagePart, ...]:
        return tuple(part for part in self.parts if isinstance(part, ImagePart))

    @property
    def sounds(self) -> tuple[AudioPart, ...]:
        return tuple(part for part in self.parts if isinstance(part, AudioPart))

    @property
    def texts(self) -> tuple[TextPart, ...]:
        return tuple(part for part in self.parts if isinstance(part, TextPart))


def read_messages(
    source: bytes,
    files: Sequence[bytes],
    limits: LimitsConfig,
    roles: Collection[str] = ROLES,
    sounds: Sequence[bytes] = (),
    audio: AudioSection | None = None,
) -> list[Message]:
    """Parse MESSAGES.

    Args:
        source: UTF-8 JSON text.
        files: the elements of IMAGES, in order; each goes to the next part of type image.
        roles: the roles that the checkpoint's template knows.
        sounds: the elements of AUDIO, in order; each goes to the next part of type audio.
        audio: limits of these; left out, the defaults.

    Raises:
        RequestError: anything that is not exactly such a chat, named like `MESSAGES[2].content[0].type`, or a number
            of image or audio parts that differs from the number of files.
    """
    media = _Media(files, limits, sounds, audio or AudioSection())
    turns = _parse_json(source)
    if not isinstance(turns, list) or not turns:
        raise _wrong_type("MESSAGES", turns, "a non-empty list of messages")
    messages = [_read_message(turn, f"MESSAGES[{i}]", media, roles) for i, turn in enumerate(turns)]
    if media.images_taken != len(files):
        got = Exact(f"{len(files)} images for {media.images_taken} parts of type image in MESSAGES")
        raise invalid("IMAGES", got, "one image for each such part")
    if media.sounds_taken != len(sounds):
        got = Exact(f"{len(sounds)} files for {media.sounds_taken} parts of type audio in MESSAGES")
        raise invalid("AUDIO", got, "one file for each such part")
    media.check_counts(sum(len(turn.images) for turn in messages), sum(len(turn.sounds) for turn in messages))
    return messages


def read_prompt(
    source: bytes,
    files: Sequence[bytes],
    limits: LimitsConfig,
    sounds: Sequence[bytes] = (),
    audio: AudioSection | None = None,
) -> list[Message]:
    """One user turn from PROMPT: all images in order, all sounds, then the text, which sound may replace.

    Raises:
        RequestError: the text is not UTF-8, or empty without any sound, or there are too many images or sounds.
    """
    media = _Media(files, limits, sounds, audio or AudioSection())
    text = _decode(source, "PROMPT")
    if not text.strip() and not sounds:
        raise invalid("PROMPT", text, "a non-empty text, or AUDIO")
    parts: list[Part] = [media.take_image() for _ in files]
    parts += [media.take_sound() for _ in sounds]
    parts += [TextPart(text, "PROMPT")] if text.strip() else []
    return [Message("user", tuple(parts), is_list=True)]


class _Media:
    """The elements of IMAGES and of AUDIO in order, and how many of them were asked for, which may be more than there
    are."""

    def __init__(
        self, images: Sequence[bytes], limits: LimitsConfig, sounds: Sequence[bytes], audio: AudioSection
    ) -> None:
        self.images = images
        self.limits = limits
        self.sounds = sounds
        self.audio = audio
        self.images_taken = 0
        self.sounds_taken = 0
        self.check_counts(len(images), len(sounds))

    def check_counts(self, images: int, sounds: int) -> None:
        if images > self.limits.max_images:
            raise invalid("IMAGES", Exact(f"{images} images"), f"at most {self.limits.max_images} in one request")
        if sounds > self.audio.max_audio_files:
            raise invalid("AUDIO", Exact(f"{sounds} files"), f"at most {self.audio.max_audio_files} in one request")

    def take_image(self) -> ImagePart:
        i, self.images_taken = self.images_taken, self.images_taken + 1
        name = f"IMAGES[{i}]"
        file = self.images[i] if i < len(self.images) else b""
        if file[:5] == b"data:":  # a JSON request cannot hold raw bytes
            file = decode_data_url(_decode(file, name), self.limits, name)
        return ImagePart(file, name)

    def take_sound(self) -> AudioPart:
        i, self.sounds_taken = self.sounds_taken, self.sounds_taken + 1
        name = f"AUDIO[{i}]"
        file = self.sounds[i] if i < len(self.sounds) else b""
        if file[:5] == b"data:":
            file = decode_audio_url(_decode(file, name), self.audio, name)
        return AudioPart(file, name)


def _decode(source: bytes, name: str) -> str:
    try:
        return source.decode("utf-8")
    except UnicodeDecodeError as error:
        got = Exact(f"bytes that are not UTF-8 at offset {error.start}")
        raise invalid(name, got, "UTF-8 text") from None


def _parse_json(source: bytes) -> Any:
    text = _decode(source, "MESSAGES")
    if not text.strip():
        raise invalid("MESSAGES", text, "a non-empty JSON list of messages")
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        got = f"{error.msg} at line {error.lineno} column {error.colno}"
        raise RequestError(f"MESSAGES: not JSON ({got}); allowed: a JSON list of messages") from None
    except (ValueError, RecursionError):  # a number of thousands of digits, thousands of brackets
        raise RequestError("MESSAGES: too deep or too long to be read; allowed: a JSON list of messages") from None


def _read_message(turn: Any, name: str, media: _Media, roles: Collection[str]) -> Message:
    # OpenAI's own client sends back empty fields of its answers: null is the same as absent.
    turn = _fields(turn, name, ("role", "content"))
    role, content = turn.get("role"), turn.get("content")
    if not isinstance(role, str) or role not in roles:
        raise _wrong_type(f"{name}.role", role, ", ".join(roles))
    if isinstance(content, str):
        return Message(role, (_text(content, f"{name}.content"),), is_list=False)
    if not isinstance(content, list) or not content:
        raise _wrong_type(f"{name}.content", content, "a string or a non-empty list of parts")
    parts = tuple(_read_part(part, f"{name}.content[{j}]", media) for j, part in enumerate(content))
    if role != "user":
        for j, part in enumerate(parts):
            if not isinstance(part, TextPart):
                raise invalid(f"{name}.content[{j}].type", content[j]["type"], f"text, as the role is {role}")
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
        return ImagePart(decode_data_url(url, media.limits, f"{name}.image_url.url"), f"{name}.image_url.url")
    if kind == "audio":
        _fields(part, name, ("type",))
        return media.take_sound()
    if kind == "input_audio":
        sound = _fields(part, name, ("type", "input_audio")).get("input_audio")
        where = f"{name}.input_audio.data"
        data = _fields(sound, f"{name}.input_audio", ("data", "format")).get("data")  # the file says its format itself
        if not isinstance(data, str):
            raise _wrong_type(where, data, "a file in base64")
        return AudioPart(decode_base64(data, media.audio.max_audio_bytes, where, "per audio file"), where)
    if not isinstance(part, dict):
        raise _wrong_type(name, part, f"an object with a type ({PART_TYPES})")
    raise _wrong_type(f"{name}.type", kind, PART_TYPES)


def _text(text: str, name: str) -> TextPart:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise RequestError(f"{name}: got half of a surrogate pair; allowed: text in whole characters") from None
    return TextPart(text, name)


def _fields(value: Any, name: str, allowed: tuple[str, ...]) -> dict[str, Any]:
    """The fields of an object that are not null; another field is refused by its name."""
    if not isinstance(value, dict):
        raise _wrong_type(name, value, f"an object with {', '.join(allowed)}")
    fields = {key: field for key, field in value.items() if field is not None}
    for key in fields:
        if key not in allowed:
            raise RequestError(f"{name}: got the unknown field {key[:80]!r}; allowed: {', '.join(allowed)}")
    return fields


def _wrong_type(name: str, value: Any, allowed: str) -> RequestError:
    got: Any = value
    if value is None:
        got = Exact("nothing")
    elif isinstance(value, (dict, list)):
        got = Exact(f"{'a' if value else 'an empty'} JSON {'object' if isinstance(value, dict) else 'list'}")
    return invalid(name, got, allowed)
