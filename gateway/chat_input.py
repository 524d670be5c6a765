"""A request's chat in the ensemble's format: MESSAGES as JSON, images and audio as separate files."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from autoglm.media.payload import decode_base64
from gateway.fetch import ImageFetcher
from gateway.schema import ChatMessage, ContentAudioPart, ContentPart, ContentTextPart


@dataclass
class ChatInput:
    """Input tensors. `names` maps the server's names of fields to the caller's, for error messages."""

    messages: str | None = None
    prompt: str | None = None
    images: list[bytes] = field(default_factory=list)
    audio: list[bytes] = field(default_factory=list)
    names: dict[str, str] = field(default_factory=dict)


async def from_messages(messages: Sequence[ChatMessage], fetcher: ImageFetcher, max_audio_bytes: int) -> ChatInput:
    """The input of a chat, its images fetched.

    Raises:
        RequestError: an image cannot be fetched, an audio file is not base64, or either is too large.
    """
    chat = ChatInput(names=dict.fromkeys(("MESSAGES", "IMAGES", "AUDIO", "prompt"), "messages"))

    async def read_turn(i: int, message: ChatMessage) -> dict[str, Any]:
        if isinstance(message.content, str):
            return {"role": message.role, "content": message.content}
        parts = [await read_part(part, f"messages[{i}].content[{j}]") for j, part in enumerate(message.content)]
        return {"role": message.role, "content": parts}

    async def read_part(part: ContentPart, name: str) -> dict[str, Any]:
        if isinstance(part, ContentTextPart):
            return {"type": "text", "text": part.text}
        if isinstance(part, ContentAudioPart):
            name = f"{name}.input_audio.data"
            chat.names[f"AUDIO[{len(chat.audio)}]"] = name
            chat.audio.append(decode_base64(part.input_audio.data, max_audio_bytes, name))
            return {"type": "audio"}
        name = f"{name}.image_url.url"
        fetcher.check_count(len(chat.images) + 1)
        chat.names[f"IMAGES[{len(chat.images)}]"] = name
        chat.images.append(await fetcher.image(part.image_url.url, name))
        return {"type": "image"}

    turns = [await read_turn(i, message) for i, message in enumerate(messages)]
    chat.messages = json.dumps(turns, ensure_ascii=False)
    return chat


def from_prompt(prompt: str) -> ChatInput:
    """The input of a single user's turn of text."""
    return ChatInput(prompt=prompt, names={"PROMPT": "prompt"})
