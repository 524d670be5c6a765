"""The chat of a request as the ensemble takes it: MESSAGES as JSON, images and sound beside it as files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from autoglm.media.image_file import decode_base64
from gateway.fetch import Fetcher
from gateway.schema import AudioPart, Message, Part, TextPart


@dataclass
class Content:
    """`names` says what the server's fields are called in the request that this was made of, for messages."""

    messages: str | None = None
    prompt: str | None = None
    images: list[bytes] = field(default_factory=list)
    audio: list[bytes] = field(default_factory=list)
    names: dict[str, str] = field(default_factory=dict)


async def of_chat(messages: Sequence[Message], fetcher: Fetcher, max_audio_bytes: int) -> Content:
    """The content of a chat, with its images from wherever they are.

    Raises:
        RequestError: an image or a sound cannot be had.
    """
    content = Content(names=dict.fromkeys(("MESSAGES", "IMAGES", "AUDIO"), "messages"))

    async def turn(i: int, message: Message) -> dict[str, Any]:
        if isinstance(message.content, str):
            return {"role": message.role, "content": message.content}
        parts = [await of_part(part, f"messages[{i}].content[{j}]") for j, part in enumerate(message.content)]
        return {"role": message.role, "content": parts}

    async def of_part(part: Part, name: str) -> dict[str, Any]:
        if isinstance(part, TextPart):
            return {"type": "text", "text": part.text}
        if isinstance(part, AudioPart):
            name = f"{name}.input_audio.data"
            content.names[f"AUDIO[{len(content.audio)}]"] = name
            content.audio.append(decode_base64(part.input_audio.data, max_audio_bytes, name, "per audio file"))
            return {"type": "audio"}
        name = f"{name}.image_url.url"
        fetcher.check_count(len(content.images) + 1)
        content.names[f"IMAGES[{len(content.images)}]"] = name
        content.images.append(await fetcher.image(part.image_url.url, name))
        return {"type": "image"}

    turns = [await turn(i, message) for i, message in enumerate(messages)]
    content.messages = json.dumps(turns, ensure_ascii=False)
    return content


def of_prompt(prompt: str) -> Content:
    """A user's turn of text alone."""
    return Content(prompt=prompt, names={"PROMPT": "prompt"})
