"""What a grammar cannot say of a phone agent's answer: that it ends in time, and that no text looks like its action."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib.resources import files

import numpy as np

from autoglm.errors import Exact, invalid
from autoglm.llm.transfer import Numbers

TAGS = ("<think>", "</think>", "<answer>")
# Clients look for the action by these (Open-AutoGLM, phone_agent/model/client.py): they occur where it begins only.
MARKS = (b"finish(message=", b"do(action=", b"<answer>")
_BEGINNINGS = frozenset(mark[:length] for mark in MARKS for length in range(1, len(mark)))
_LONGEST = max(map(len, _BEGINNINGS))
_ENDS = tuple(mark[length:] for mark in MARKS for length in range(len(mark)))
# Tokens within which an answer surely ends: from the middle of a character of a thought on, with the rest of it, the
# tags, and the 52 bytes of the longest action without text (a swipe); from the middle of an action's text on.
RESERVE = 64
TEXT_RESERVE = 8


def grammar() -> str:
    """The answer's form, in llguidance's dialect of Lark."""
    return files("autoglm.llm.structured_output").joinpath("phone_action.lark").read_text(encoding="utf-8")


class Rules:
    """What the masks of one checkpoint's answers are narrowed to."""

    def __init__(self, texts: Iterable[bytes], tags: Mapping[str, int]) -> None:
        """`texts` are the bytes of every token, by id, none of tokens that are no text; `tags` has the ids of TAGS.

        Raises:
            RequestError: the checkpoint lacks one of TAGS.
        """
        for tag in TAGS:
            if tag not in tags:
                got = Exact(f"phone_action, but the checkpoint has no token {tag}")
                raise invalid("response_format", got, "json_object, json_schema")
        self.texts = list(texts)
        self.think, self.end, self.answer = (tags[tag] for tag in TAGS)
        self.no_more_thought = self._only([self.end])
        self.no_more_text = self._only(i for i, text in enumerate(self.texts) if text in (b'"', b'")'))
        self.one_byte = self._only(i for i, text in enumerate(self.texts) if len(text) == 1)
        ends = [i for i, text in enumerate(self.texts) if text.startswith(_ENDS) or any(m in text for m in MARKS)]
        self.unmarked = {beginning: self._unmarked(beginning, ends) for beginning in (b"", *_BEGINNINGS)}

    def _only(self, ids: Iterable[int]) -> Numbers:
        allowed = np.zeros(-(-len(self.texts) // 32) * 32, np.uint8)
        allowed[list(ids)] = 1
        return np.packbits(allowed, bitorder="little").view(np.int32)

    def _unmarked(self, beginning: bytes, ends: list[int]) -> Numbers | None:
        """The tokens that complete no mark behind a `beginning` of one; None: all. `ends` can complete one."""
        completing = [i for i in ends if any(mark in beginning + self.texts[i] for mark in MARKS)]
        return ~self._only(completing) if completing else None


class Course:
    """One answer on its way to the action's end."""

    def __init__(self, rules: Rules, max_tokens: int) -> None:
        """Raises RequestError where `max_tokens` may be too few for an action."""
        if max_tokens < RESERVE:
            raise invalid("max_tokens", max_tokens, f"at least {RESERVE} with response_format phone_action")
        self._rules = rules
        self._left = max_tokens
        self._acts = False
        # The longest end of the text that begins a mark. None where the action is to begin, which a mark does.
        self._beginning: bytes | None = b""

    def accept(self, token_id: int) -> None:
        self._left -= 1
        if token_id == self._rules.answer:
            self._acts, self._beginning = True, None
        elif token_id not in (self._rules.think, self._rules.end):
            text = self._rules.texts[token_id]
            # What lacks its first character is no mark.
            text = text[1:] if self._beginning is None else self._beginning + text
            lengths = range(min(len(text), _LONGEST), 0, -1)
            self._beginning = next((text[-n:] for n in lengths if text[-n:] in _BEGINNINGS), b"")

    def narrow(self, mask: Numbers) -> None:
        """Take from `mask`, int32 [words], tokens that the grammar allows. One of them stays at the least."""
        if self._beginning is not None:
            unmarked = self._rules.unmarked[self._beginning]
            if unmarked is not None:
                mask &= unmarked
        if self._left <= (TEXT_RESERVE if self._acts else RESERVE):
            closing = self._rules.no_more_text if self._acts else self._rules.no_more_thought
            # Within a character, or behind a backslash, nothing closes yet: on by as little as there is.
            for only in (closing, self._rules.one_byte):
                if (mask & only).any():
                    mask &= only
                    break
