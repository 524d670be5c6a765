"""From a chat to token ids, through the checkpoint's own template and tokenizer.

Text of a request is text: a control token that it spells out, such as `<|user|>` or `<|image|>`, is encoded as the
characters it consists of and can neither open a turn nor stand for an image (transformers and vLLM take it for the
token). The tags of an answer in the history (`<think>`, `<answer>`) stay tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, Literal

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from autoglm.config import LimitsConfig
from autoglm.errors import Exact, RequestError, invalid, shorten
from autoglm.media import ImageFile, media_hash, read_image
from autoglm.messages import ROLES, ImagePart, Message, TextPart
from autoglm.tokenizer import HIDDEN_TAG, VISIBLE_TAGS
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
    """Token ids with every image placeholder repeated once per visual token, and the images in order."""

    token_ids: list[int]
    images: list[ImageFile]
    image_tokens: int


class ChatRenderer:
    """Renders chats for one checkpoint.

    Args:
        content_format: "string" puts a turn's images first and joins them and the texts with newlines, as vLLM's
            content format of that name; "list" hands the parts to the template as they are.
        max_context: tokens of a prompt and its answer together.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        tokenizer: Tokenizer,
        limits: LimitsConfig,
        max_context: int,
        content_format: Literal["string", "list"] = "string",
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
        special = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}
        controls = (special | set(image_tokens)) - {*VISIBLE_TAGS, HIDDEN_TAG}
        self.controls = re.compile("|".join(re.escape(text) for text in sorted(controls, key=len, reverse=True)))

    def render(self, messages: Sequence[Message], image_limits: ImageLimits | None = None) -> Prompt:
        """Token ids of a chat that ends with the beginning of the assistant's turn.

        Args:
            image_limits: of this request; left out, the server's.

        Raises:
            RequestError: an image is refused, the template refuses the chat or leaves out an image, or the prompt
                leaves no room for an answer.
        """
        size = sum(len(part.text.encode()) for message in messages for part in message.texts)
        if size > MAX_BYTES_PER_TOKEN * self.max_context:
            got = Exact(f"a text of {size} bytes")
            raise invalid("prompt", got, f"at most {self.max_context - 1} tokens, the context of {self.max_context}")
        image_limits = image_limits or self.image_limits
        images = [_image_file(part, self.limits, image_limits) for message in messages for part in message.images]
        ids = self._token_ids(messages)
        image_token = self.checkpoint.image_token_id
        rendered = ids.count(image_token)
        if rendered != len(images):
            raise invalid("prompt", Exact(f"{len(images)} images"), f"the {rendered} that the chat template shows")
        counts = [tokens_of(image.grid, image_limits) for image in images]
        total = len(ids) - len(images) + sum(counts)
        if total >= self.max_context:
            got = Exact(f"{total} tokens ({sum(counts)} of them for {len(images)} images)")
            allowed = f"at most {self.max_context - 1}, one less than the context of {self.max_context}"
            raise invalid("prompt", got, allowed)
        following = iter(counts)
        token_ids = [id_ for id_ in ids for _ in range(next(following) if id_ == image_token else 1)]
        return Prompt(token_ids, images, sum(counts))

    def _token_ids(self, messages: Sequence[Message]) -> list[int]:
        """Ids of the rendered chat, one placeholder for each image."""
        texts = "".join(part.text for message in messages for part in message.texts)
        mark = next((mark for mark in MARKS if mark not in texts), None)
        if mark is None:
            raise RequestError("prompt: got a text with all 32 noncharacters U+FDD0 to U+FDEF; allowed: real text")
        turns = [{"role": message.role, "content": self._content(message, mark)} for message in messages]
        try:
            rendered = self.template.render(messages=turns, tools=None, documents=None, add_generation_prompt=True)
        except jinja2.TemplateError as error:
            raise RequestError(f"prompt: the checkpoint's chat template refuses it: {shorten(str(error))}") from None
        # Each marked token is cut in two here, so neither half of it is found as a token.
        pieces = rendered.split(mark)
        return [id_ for piece in pieces for id_ in self.tokenizer.encode(piece, add_special_tokens=False).ids]

    def _content(self, message: Message, mark: str) -> str | list[dict[str, str]]:
        """A message's content as the template gets it."""
        texts = self._marked(message.texts, mark)
        if self.content_format == "string":
            return "\n".join([self.placeholder] * len(message.images) + ["\n".join(texts)])
        if message.role != "user" or not message.is_list:
            return "".join(texts)  # templates print other roles' content as it is
        remaining = iter(texts)
        return [
            {"type": "text", "text": next(remaining)} if isinstance(part, TextPart) else {"type": "image"}
            for part in message.parts
        ]

    def _marked(self, parts: Sequence[TextPart], mark: str) -> list[str]:
        """The texts with a mark after the first character of every control token that they spell out."""
        texts = [self._mark(part.text, mark) for part in parts]
        if len(texts) > 1 and self.controls.search("".join(texts)):
            texts[1:] = [mark + text for text in texts[1:]]  # two parts spell a token together
        return texts

    def _mark(self, text: str, mark: str) -> str:
        return self.controls.sub(lambda match: match[0][:1] + mark + match[0][1:], text)


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
