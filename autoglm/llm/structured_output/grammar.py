"""What an answer may consist of: grammars, compiled by llguidance, and where an answer is in its own."""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Collection, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from llguidance import LLExecutor, LLMatcher, LLParserLimits, LLTokenizer

from autoglm.errors import RequestError
from autoglm.llm.structured_output import phone_action
from autoglm.llm.transfer import Numbers

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

# At most one blank between the parts: unlimited, an answer at a high temperature may go on with nothing else.
JSON_STYLE: JsonCompileOptions = {"whitespace_pattern": r"[ \n]?"}
COMPILED = 64  # grammars that are kept
# Tokens of plain text, which masks take over at once where the grammar takes them all: for a thought too.
SLICES = [*LLTokenizer.general_slices(), r"(?s:.)+"]


class Grammars:
    """The grammars of one checkpoint. Thread safe."""

    def __init__(self, path: Path, vocab_size: int, eos_token_ids: Collection[int]) -> None:
        """`path` is the checkpoint's directory; its tokenizer is read when the first grammar is made."""
        self._path, self._vocab_size, self._eos = path, vocab_size, list(eos_token_ids)
        self._reading = threading.Lock()
        self._tokenizer: LLTokenizer | None = None
        self._tags: dict[str, int] = {}
        self._rules: phone_action.Rules | None = None
        self._looking = threading.Lock()
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()

    def prepare(self) -> None:
        """Read what grammars are made of, so that no request waits for it."""
        with suppress(RequestError):  # there are checkpoints without actions
            self._action_rules(self._read())

    def matcher(self, response_format: str, max_tokens: int) -> Matcher:
        """The beginning of an answer that has at most `max_tokens` tokens.

        `response_format` is that of `SamplingParams`. A phone's action ends within `max_tokens`; JSON may not.

        Raises:
            RequestError: no grammar can be made of `response_format`, or `max_tokens` may be too few for an action.
        """
        tokenizer = self._read()
        kind = json.loads(response_format)["type"]
        course = phone_action.Course(self._action_rules(tokenizer), max_tokens) if kind == "phone_action" else None
        with self._looking:
            compiled = self._compiled.get(response_format)
            if compiled is not None:
                self._compiled.move_to_end(response_format)
                return Matcher(compiled.deep_copy(), course)
        compiled = _compile(tokenizer, response_format)
        with self._looking:
            self._compiled[response_format] = compiled
            if len(self._compiled) > COMPILED:
                self._compiled.popitem(last=False)
            return Matcher(compiled.deep_copy(), course)

    def _read(self) -> LLTokenizer:
        with self._reading:
            if self._tokenizer is None:
                description = json.loads((self._path / "tokenizer.json").read_text(encoding="utf-8"))
                # No text may contain an added token: </answer>, which is not special, would end the answer.
                for token in description["added_tokens"]:
                    token["special"] = True
                    self._tags[token["content"]] = token["id"]
                text = json.dumps(description)
                self._tokenizer = LLTokenizer(text, n_vocab=self._vocab_size, eos_token=self._eos, slices=SLICES)
            return self._tokenizer

    def _action_rules(self, tokenizer: LLTokenizer) -> phone_action.Rules:
        with self._reading:
            if self._rules is None:
                added = set(self._tags.values())
                texts = (b"" if i in added else tokenizer.decode_bytes([i]) for i in range(self._vocab_size))
                self._rules = phone_action.Rules(texts, self._tags)
            return self._rules


def _compile(tokenizer: LLTokenizer, response_format: str) -> LLMatcher:
    wanted = json.loads(response_format)
    if wanted["type"] == "phone_action":
        grammar = LLMatcher.grammar_from_lark(phone_action.grammar())
    else:
        schema = wanted["json_schema"]["schema"] if wanted["type"] == "json_schema" else {"type": "object"}
        grammar = LLMatcher.grammar_from_json_schema(schema, overrides=JSON_STYLE)
    compiled = LLMatcher(tokenizer, grammar, log_level=0, limits=LLParserLimits(verbose_errors=False))
    if compiled.is_error():
        raise RequestError(f"response_format: no grammar can be made of it: {compiled.get_error()[:400]}")
    return compiled


class Matcher:
    """Where one answer is in its grammar."""

    def __init__(self, state: LLMatcher, course: phone_action.Course | None) -> None:
        self.state = state
        self.course = course

    def accept(self, token_id: int) -> None:
        """Go on by one token. Raises RuntimeError where the grammar has no such token here, or fails."""
        # Once it has failed, it still takes what ends the text.
        if self.state.is_error() or not self.state.consume_token(token_id):
            raise RuntimeError(f"the grammar refuses token {token_id}: {self.state.get_error()}")
        if self.course is not None:
            self.course.accept(token_id)

    def forced(self) -> list[int]:
        """The tokens that must come next, none where there is a choice. They are not accepted yet."""
        return list(self.state.compute_ff_tokens())

    @property
    def done(self) -> bool:
        """Whether nothing may follow. Where the grammar has failed, the next token says so."""
        return self.state.is_stopped() and not self.state.is_error()


def token_masks(matchers: Sequence[Matcher | None], vocab_size: int) -> Numbers:
    """Which tokens may come next.

    Returns:
        int32 [n, ceil(vocab_size / 32)]: token t is bit t % 32 of word t // 32. All are set where there is no matcher.
    """
    masks = np.full((len(matchers), -(-vocab_size // 32)), -1, np.int32)
    states = [(matcher.state, row) for row, matcher in enumerate(matchers) if matcher is not None]
    if states:
        _executor().unsafe_compute_mask_ptr(states, masks.ctypes.data, masks[0].nbytes, len(masks))
    for matcher, mask in zip(matchers, masks, strict=True):
        if matcher is not None and matcher.course is not None:
            matcher.course.narrow(mask)
    return masks


@cache
def _executor() -> LLExecutor:
    return LLExecutor()
