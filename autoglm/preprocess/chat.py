"""Renders chats to token ids with the checkpoint's template and tokenizer.

Control tokens spelled out in a request's text, such as `<|user|>` or `<|image|>`, are encoded as ordinary characters:
text can neither open a turn nor insert an image (in transformers and vLLM it can). The tags of answers in the history
(`<think>`, `<answer>`) remain tokens.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any, Literal

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from autoglm.audio.speech import Speech, no_speech
from autoglm.config import AudioMode, AudioSection, ConfigError, LimitsConfig
from autoglm.errors import RequestError, Verbatim, invalid, shorten
from autoglm.media.audio_file import AudioFile
from autoglm.media.image_file import ImageFile, ImagePart, media_hash, read_image
from autoglm.preprocess.messages import ROLES, Message, TextPart
from autoglm.preprocess.tokenizer import PlainText
from autoglm.vision.image_processor import grid_of, smart_resize, tokens_of
from autoglm.vision.pixel_limits import server_limits

if TYPE_CHECKING:
    from autoglm.checkpoint import Checkpoint, ImageLimits

log = logging.getLogger(__name__)

# Unicode noncharacters. One that the request does not use marks the control tokens spelled out in its texts.
MARKS = [chr(code) for code in range(0xFDD0, 0xFDF0)]
# More than any real text over a whole context. Longer texts are rejected before tokenisation, which would take seconds.
MAX_BYTES_PER_TOKEN = 16


@dataclass(frozen=True)
class RenderedPrompt:
    """Token ids, with one placeholder per token of an image or clip and one per clip to be transcribed; images and
    clips in order."""

    token_ids: list[int]
    images: list[ImageFile]
    num_image_tokens: int
    clips: list[AudioFile] = field(default_factory=list)


class ChatRenderer:
    """Renders chats for one checkpoint.

    Args:
        max_context: tokens of a prompt and its answer together.
        content_format: "string" joins a turn's images, then its texts, with newlines, like vLLM's content format of
            that name; "list" passes the parts to the template. A clip takes the place of a text.
        speech: the speech encoder; None rejects audio.
        audio: mode and limits of audio; None uses the defaults.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        tokenizer: Tokenizer,
        limits: LimitsConfig,
        *,
        max_context: int,
        content_format: Literal["string", "list"] = "string",
        speech: Speech | None = None,
        audio: AudioSection | None = None,
    ) -> None:
        self.checkpoint = checkpoint
        self.limits = limits
        self.image_limits = server_limits(checkpoint.image_limits, limits)
        self.max_context = max_context
        self.content_format = content_format
        self.template = _environment().from_string(checkpoint.chat_template)
        tools = (role for role in ("tool", "observation") if re.search(f"['\"]{role}['\"]", checkpoint.chat_template))
        self.roles = (*ROLES, *tools)
        self.tokenizer = tokenizer
        tokenizer.no_truncation()
        tokenizer.no_padding()
        ids = [checkpoint.image_start_token_id, checkpoint.image_token_id, checkpoint.image_end_token_id]
        image_tokens = [token for id_ in ids if (token := tokenizer.id_to_token(id_)) is not None]
        if len(image_tokens) != len(ids):
            raise ValueError(f"tokenizer.json has no tokens for config.json's image token ids {ids}")
        self.placeholder = "".join(image_tokens)
        self.plain_text = PlainText(tokenizer, image_tokens)
        self.speech = speech
        self.audio = audio or AudioSection()
        highest = max(tokenizer.get_vocab().values())
        if speech is not None and highest >= checkpoint.audio_token_id:
            raise ConfigError(
                f"AUTOGLM_SPEECH cannot be used with this checkpoint: the last id of its vocabulary, "
                f"{checkpoint.audio_token_id}, must be free for audio, but its tokenizer has ids up to {highest}"
            )

    def render(
        self, messages: Sequence[Message], image_limits: ImageLimits | None = None, audio_mode: AudioMode | None = None
    ) -> RenderedPrompt:
        """Token ids of a chat, up to the start of the assistant's turn.

        Args:
            image_limits, audio_mode: of this request; None uses the server's.

        Raises:
            RequestError: an image or clip is not accepted, the template rejects the chat or omits one of them, or the
                prompt leaves no room for an answer.
        """
        size = sum(len(part.text.encode()) for message in messages for part in message.texts)
        if size > MAX_BYTES_PER_TOKEN * self.max_context:
            raise invalid("prompt", Verbatim(f"a text of {size} bytes"), self._accepted_length())
        image_limits = image_limits or self.image_limits
        images = [_image_file(part, self.limits, image_limits) for message in messages for part in message.images]
        clips = self._clips(messages, audio_mode or self.audio.mode)
        ids = self._token_ids(messages)
        counts = {self.checkpoint.image_token_id: [tokens_of(image.grid, image_limits) for image in images]}
        if clips:
            counts[self.checkpoint.audio_token_id] = [clip.num_tokens or 1 for clip in clips]
        for (id_, expected), kind in zip(counts.items(), ("images", "clips"), strict=False):
            rendered = ids.count(id_)
            if rendered != len(expected):
                message = f"prompt has {len(expected)} {kind}, but the checkpoint's chat template renders {rendered}"
                raise RequestError(message)
        visual = sum(counts[self.checkpoint.image_token_id])
        total = len(ids) + sum(sum(expected) - len(expected) for expected in counts.values())
        if total >= self.max_context:
            got = Verbatim(f"{total} tokens, {visual} of them for {len(images)} images")
            raise invalid("prompt", got, self._accepted_length())
        remaining = {id_: iter(expected) for id_, expected in counts.items()}
        token_ids = [id_ for id_ in ids for _ in range(next(remaining[id_]) if id_ in remaining else 1)]
        return RenderedPrompt(token_ids, images, visual, clips)

    def _accepted_length(self) -> str:
        return f"at most {self.max_context - 1} tokens, one less than the context of {self.max_context}"

    def _clips(self, messages: Sequence[Message], mode: AudioMode) -> list[AudioFile]:
        parts = [part for message in messages for part in message.clips]
        if parts and self.speech is None:
            raise no_speech()
        return [self.speech.clip(part, mode, self.audio) for part in parts if self.speech]

    def _token_ids(self, messages: Sequence[Message]) -> list[int]:
        """Ids of the rendered chat, with one placeholder per image and clip."""
        texts = "".join(part.text for message in messages for part in message.texts)
        free = [mark for mark in MARKS if mark not in texts][:2]
        if len(free) < 2:
            raise RequestError("prompt must leave two of the noncharacters U+FDD0 to U+FDEF unused")
        mark, clip = free
        turns = [{"role": message.role, "content": self._content(message, mark, clip)} for message in messages]
        try:
            rendered = self.template.render(messages=turns, tools=None, documents=None, add_generation_prompt=True)
        except _RejectedError as error:
            raise RequestError(f"prompt is rejected by the checkpoint's chat template: {shorten(str(error))}") from None
        except jinja2.TemplateError as error:
            log.info("the chat template failed: %s", error)
            raise RequestError("prompt cannot be rendered by the checkpoint's chat template") from None
        ids: list[int] = []
        for piece in rendered.split(clip):
            ids += [self.checkpoint.audio_token_id, *self.plain_text.encode(piece, mark)]
        return ids[1:]

    def _content(self, message: Message, mark: str, clip: str) -> str | list[dict[str, str]]:
        """A message's content for the template; `clip` is the text that represents a clip."""
        words = [part for part in message.parts if not isinstance(part, ImagePart)]
        texts = self.plain_text.mark([part.text if isinstance(part, TextPart) else clip for part in words], mark)
        if self.content_format == "string":
            return "\n".join([self.placeholder] * len(message.images) + ["\n".join(texts)])
        if message.role != "user" or not message.is_list:
            return "".join(texts)  # templates print the content of other roles as a string
        remaining = iter(texts)
        return [
            {"type": "image"} if isinstance(part, ImagePart) else {"type": "text", "text": next(remaining)}
            for part in message.parts
        ]


def _image_file(part: ImagePart, limits: LimitsConfig, image_limits: ImageLimits) -> ImageFile:
    info = read_image(part.data, limits, part.name)
    grid = grid_of(smart_resize(info.height, info.width, image_limits, part.name), image_limits)
    return ImageFile(part.data, grid, media_hash(part.data, grid), part.name)


class _RejectedError(jinja2.TemplateError):
    """Raised by the template itself; the message is written for callers."""


def _environment() -> ImmutableSandboxedEnvironment:
    """Jinja with the settings of transformers' chat templates."""

    def raise_exception(message: str) -> None:
        raise _RejectedError(message)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda text: datetime.now().strftime(text)
    return environment
