"""From a chat to token ids, through the checkpoint's own template and tokenizer.

Text of a request is text: a control token that it spells out, such as `<|user|>` or `<|image|>`, is encoded as the
characters it consists of and can neither open a turn nor stand for an image (transformers and vLLM take it for the
token). The tags of an answer in the history (`<think>`, `<answer>`) stay tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any, Literal

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from autoglm.audio.speech import Mode, Speech, no_speech
from autoglm.config import AudioSection, ConfigError, LimitsConfig
from autoglm.errors import Exact, RequestError, invalid, shorten
from autoglm.media.audio_file import AudioFile
from autoglm.media.image_file import ImageFile, ImagePart, media_hash, read_image
from autoglm.preprocess.messages import ROLES, Message, TextPart
from autoglm.preprocess.tokenizer import PlainText
from autoglm.vision.image_processor import grid_of, smart_resize, tokens_of
from autoglm.vision.pixel_limits import server_limits

if TYPE_CHECKING:
    from autoglm.checkpoint import Checkpoint, ImageLimits

# Unicode's noncharacters: one that the request does not use marks the control tokens spelled out in its texts.
MARKS = [chr(code) for code in range(0xFDD0, 0xFDF0)]
# No real text has so many bytes per token over a whole context; tokenising more only to refuse it takes seconds.
MAX_BYTES_PER_TOKEN = 16


@dataclass(frozen=True)
class Prompt:
    """Token ids with every placeholder repeated once per token of its image or clip (a clip whose transcript takes its
    place has one), and images and clips in order."""

    token_ids: list[int]
    images: list[ImageFile]
    image_tokens: int
    clips: list[AudioFile] = field(default_factory=list)


class ChatRenderer:
    """Renders chats for one checkpoint.

    Args:
        content_format: "string" puts a turn's images first and joins them and the texts with newlines, as vLLM's
            content format of that name; "list" hands the parts to the template as they are. Either way a clip stands
            where a text would.
        max_context: tokens of a prompt and its answer together.
        speech: what the server hears with; None is deaf.
        audio: limits of sound files; left out, the defaults.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        tokenizer: Tokenizer,
        limits: LimitsConfig,
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
        known = (role for role in ("tool", "observation") if re.search(f"['\"]{role}['\"]", checkpoint.chat_template))
        self.roles = (*ROLES, *known)
        self.tokenizer = tokenizer
        tokenizer.no_truncation()
        tokenizer.no_padding()
        ids = [checkpoint.image_start_token_id, checkpoint.image_token_id, checkpoint.image_end_token_id]
        image_tokens = [token for id_ in ids if (token := tokenizer.id_to_token(id_)) is not None]
        if len(image_tokens) != len(ids):
            raise ValueError(f"tokenizer.json lacks tokens for config.json's image ids {ids}")
        self.placeholder = "".join(image_tokens)
        self.plain_text = PlainText(tokenizer, image_tokens)
        self.speech = speech
        self.audio = audio or AudioSection()
        highest = max(tokenizer.get_vocab().values())
        if speech is not None and highest >= checkpoint.audio_token_id:
            raise ConfigError(
                f"speech needs an id beyond the tokenizer's, but its last, {highest}, is that of the vocabulary "
                f"(vocab_size {checkpoint.text.vocab_size}): serve this checkpoint without AUTOGLM_SPEECH"
            )

    def render(
        self, messages: Sequence[Message], image_limits: ImageLimits | None = None, audio_mode: Mode | None = None
    ) -> Prompt:
        """Token ids of a chat that ends with the beginning of the assistant's turn.

        Args:
            image_limits: of this request; left out, the server's.
            audio_mode: the same.

        Raises:
            RequestError: an image or a clip is refused, the template refuses the chat or leaves out one of them, or the
                prompt leaves no room for an answer.
        """
        size = sum(len(part.text.encode()) for message in messages for part in message.texts)
        if size > MAX_BYTES_PER_TOKEN * self.max_context:
            got = Exact(f"a text of {size} bytes")
            raise invalid("prompt", got, f"at most {self.max_context - 1} tokens, the context of {self.max_context}")
        image_limits = image_limits or self.image_limits
        images = [_image_file(part, self.limits, image_limits) for message in messages for part in message.images]
        clips = self._clips(messages, audio_mode or self.audio.mode)
        ids = self._token_ids(messages)
        counts = {self.checkpoint.image_token_id: [tokens_of(image.grid, image_limits) for image in images]}
        if clips:
            counts[self.checkpoint.audio_token_id] = [clip.tokens or 1 for clip in clips]
        for (id_, expected), kind in zip(counts.items(), ("images", "clips"), strict=False):
            rendered = ids.count(id_)
            if rendered != len(expected):
                got = Exact(f"{len(expected)} {kind}")
                raise invalid("prompt", got, f"the {rendered} that the chat template shows")
        visual = sum(counts[self.checkpoint.image_token_id])
        total = len(ids) + sum(sum(expected) - len(expected) for expected in counts.values())
        if total >= self.max_context:
            got = Exact(f"{total} tokens ({visual} of them for {len(images)} images)")
            allowed = f"at most {self.max_context - 1}, one less than the context of {self.max_context}"
            raise invalid("prompt", got, allowed)
        following = {id_: iter(expected) for id_, expected in counts.items()}
        token_ids = [id_ for id_ in ids for _ in range(next(following[id_]) if id_ in following else 1)]
        return Prompt(token_ids, images, visual, clips)

    def _clips(self, messages: Sequence[Message], mode: Mode) -> list[AudioFile]:
        parts = [part for message in messages for part in message.sounds]
        if parts and self.speech is None:
            raise no_speech()
        return [self.speech.clip(part, mode, self.audio) for part in parts if self.speech]

    def _token_ids(self, messages: Sequence[Message]) -> list[int]:
        """Ids of the rendered chat, one placeholder for each image and clip."""
        texts = "".join(part.text for message in messages for part in message.texts)
        free = [mark for mark in MARKS if mark not in texts][:2]
        if len(free) < 2:
            raise RequestError("prompt: got a text with nearly all noncharacters U+FDD0 to U+FDEF; allowed: real text")
        mark, clip = free
        turns = [{"role": message.role, "content": self._content(message, mark, clip)} for message in messages]
        try:
            rendered = self.template.render(messages=turns, tools=None, documents=None, add_generation_prompt=True)
        except jinja2.TemplateError as error:
            raise RequestError(f"prompt: the checkpoint's chat template refuses it: {shorten(str(error))}") from None
        ids: list[int] = []
        for piece in rendered.split(clip):
            ids += [self.checkpoint.audio_token_id, *self.plain_text.encode(piece, mark)]
        return ids[1:]

    def _content(self, message: Message, mark: str, clip: str) -> str | list[dict[str, str]]:
        """A message's content as the template gets it; `clip` is the text that stands for a clip."""
        words = [part for part in message.parts if not isinstance(part, ImagePart)]
        texts = self.plain_text.mark([part.text if isinstance(part, TextPart) else clip for part in words], mark)
        if self.content_format == "string":
            return "\n".join([self.placeholder] * len(message.images) + ["\n".join(texts)])
        if message.role != "user" or not message.is_list:
            return "".join(texts)  # templates print other roles' content as it is
        remaining = iter(texts)
        return [
            {"type": "image"} if isinstance(part, ImagePart) else {"type": "text", "text": next(remaining)}
            for part in message.parts
        ]


def _image_file(part: ImagePart, limits: LimitsConfig, image_limits: ImageLimits) -> ImageFile:
    info = read_image(part.data, limits, part.name)
    grid = grid_of(smart_resize(info.height, info.width, image_limits, part.name), image_limits)
    return ImageFile(part.data, grid, media_hash(part.data, grid), part.name)


def _environment() -> ImmutableSandboxedEnvironment:
    """Jinja as transformers sets it up for chat templates."""

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

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
