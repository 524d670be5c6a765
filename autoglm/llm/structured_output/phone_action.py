"""Constraints beyond the grammar: the action fits `max_tokens`, and text contains no action marker."""

from collections.abc import Iterable, Mapping
from importlib.resources import files

import numpy as np

from autoglm.errors import invalid
from autoglm.llm.transfer import Int32Array

TAGS = ("<think>", "</think>", "<answer>")
# Clients search the answer for these (Open-AutoGLM, phone_agent/model/client.py): only the action may contain them.
MARKERS = (b"finish(message=", b"do(action=", b"<answer>")
_PREFIXES = frozenset(marker[:length] for marker in MARKERS for length in range(1, len(marker)))
_MAX_PREFIX = max(map(len, _PREFIXES))
_SUFFIXES = tuple(marker[length:] for marker in MARKERS for length in range(len(marker)))
# Tokens that suffice to end an answer: from within a thought the rest of a character, the tags, and the 52 bytes of the
# longest action without text (a swipe); from within the text of an action, its end.
RESERVE = 64
TEXT_RESERVE = 8


def grammar() -> str:
    """The answer's grammar, in llguidance's dialect of Lark."""
    return files("autoglm.llm.structured_output").joinpath("phone_action.lark").read_text(encoding="utf-8")


class Rules:
    """The token masks of one checkpoint that restrict its answers."""

    def __init__(self, texts: Iterable[bytes], tags: Mapping[str, int]) -> None:
        """
        Args:
            texts: the bytes of every token, by id; empty for tokens that are not text.
            tags: the ids of TAGS.

        Raises:
            RequestError: the checkpoint lacks one of TAGS.
        """
        for tag in TAGS:
            if tag not in tags:
                accepted = f"json_object or json_schema for this checkpoint, which has no token {tag}"
                raise invalid("response_format", "phone_action", accepted)
        self.texts = list(texts)
        self.think, self.end, self.answer = (tags[tag] for tag in TAGS)
        self.end_thought = self._only([self.end])
        self.end_text = self._only(i for i, text in enumerate(self.texts) if text in (b'"', b'")'))
        self.one_byte = self._only(i for i, text in enumerate(self.texts) if len(text) == 1)
        candidates = [
            i for i, text in enumerate(self.texts) if text.startswith(_SUFFIXES) or any(m in text for m in MARKERS)
        ]
        self.unmarked = {prefix: self._unmarked(prefix, candidates) for prefix in (b"", *_PREFIXES)}

    def _only(self, ids: Iterable[int]) -> Int32Array:
        allowed = np.zeros(-(-len(self.texts) // 32) * 32, np.uint8)
        allowed[list(ids)] = 1
        return np.packbits(allowed, bitorder="little").view(np.int32)

    def _unmarked(self, prefix: bytes, candidates: list[int]) -> Int32Array | None:
        """The tokens that complete no marker after `prefix`; None is all. Only `candidates` can complete one."""
        completing = [i for i in candidates if any(marker in prefix + self.texts[i] for marker in MARKERS)]
        return ~self._only(completing) if completing else None


class Limiter:
    """Follows one answer, and restricts its tokens so that it ends in time and contains no marker."""

    def __init__(self, rules: Rules, max_tokens: int) -> None:
        """Raises RequestError if `max_tokens` may be too few for an action."""
        if max_tokens < RESERVE:
            accepted = f"at least {RESERVE} with response_format phone_action, as must the rest of the context"
            raise invalid("max_tokens", max_tokens, accepted)
        self._rules = rules
        self._remaining = max_tokens
        self._in_action = False
        # The longest suffix of the text that is a prefix of a marker; None at the start of the action, which is one.
        self._prefix: bytes | None = b""

    def accept(self, token_id: int) -> None:
        self._remaining -= 1
        if token_id == self._rules.answer:
            self._in_action, self._prefix = True, None
        elif token_id not in (self._rules.think, self._rules.end):
            text = self._rules.texts[token_id]
            # Skip one character so that the action's own marker does not match.
            text = text[1:] if self._prefix is None else self._prefix + text
            lengths = range(min(len(text), _MAX_PREFIX), 0, -1)
            self._prefix = next((text[-n:] for n in lengths if text[-n:] in _PREFIXES), b"")

    def restrict(self, mask: Int32Array) -> None:
        """Clear bits of `mask`, int32 [words], the tokens that the grammar allows. At least one remains."""
        if self._prefix is not None:
            unmarked = self._rules.unmarked[self._prefix]
            if unmarked is not None:
                mask &= unmarked
        if self._remaining <= (TEXT_RESERVE if self._in_action else RESERVE):
            closing = self._rules.end_text if self._in_action else self._rules.end_thought
            # Within a character or after a backslash the text cannot close yet: allow single-byte tokens.
            for only in (closing, self._rules.one_byte):
                if (mask & only).any():
                    mask &= only
                    break
