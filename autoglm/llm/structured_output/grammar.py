"""Grammars of constrained answers, compiled by llguidance, and the state of an answer in its grammar."""

from __future__ import annotations

import json
import logging
import re
import threading
from collections import OrderedDict
from collections.abc import Collection, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from llguidance import LLExecutor, LLMatcher, LLParserLimits, LLTokenizer

from autoglm.errors import RequestError, Verbatim, invalid
from autoglm.llm.structured_output import phone_action
from autoglm.llm.transfer import Int32Array

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

log = logging.getLogger(__name__)

# At most one whitespace between tokens: at a high temperature an answer might otherwise consist of whitespace.
JSON_STYLE: JsonCompileOptions = {"whitespace_pattern": r"[ \n]?"}
MAX_COMPILED = 64  # grammars in the cache
# Sets of plain text tokens whose masks are precomputed; the last one is for thoughts.
SLICES = [*LLTokenizer.general_slices(), r"(?s:.)+"]


class Grammars:
    """The grammars of one checkpoint. Thread safe."""

    def __init__(self, path: Path, vocab_size: int, eos_token_ids: Collection[int]) -> None:
        """path: the checkpoint's directory. Its tokenizer is read for the first grammar."""
        self._path, self._vocab_size, self._eos = path, vocab_size, list(eos_token_ids)
        self._read_lock = threading.Lock()
        self._tokenizer: LLTokenizer | None = None
        self._tags: dict[str, int] = {}
        self._rules: phone_action.Rules | None = None
        self._cache_lock = threading.Lock()
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()

    def prepare(self) -> None:
        """Read the tokenizer in advance, so that no request waits for it."""
        with suppress(RequestError):  # the checkpoint may lack the tokens of actions
            self._action_rules(self._read())

    def matcher(self, response_format: str, max_tokens: int) -> Matcher:
        """The initial state of an answer of at most `max_tokens` tokens.

        A phone action is guaranteed to end within `max_tokens`; JSON is not.

        Args:
            response_format: see `SamplingParams`.

        Raises:
            RequestError: `response_format` cannot be compiled, or `max_tokens` is too small for an action.
        """
        tokenizer = self._read()
        kind = json.loads(response_format)["type"]
        limiter = phone_action.Limiter(self._action_rules(tokenizer), max_tokens) if kind == "phone_action" else None
        with self._cache_lock:
            compiled = self._compiled.get(response_format)
            if compiled is not None:
                self._compiled.move_to_end(response_format)
                return Matcher(compiled.deep_copy(), limiter)
        compiled = _compile(tokenizer, response_format)
        with self._cache_lock:
            self._compiled[response_format] = compiled
            if len(self._compiled) > MAX_COMPILED:
                self._compiled.popitem(last=False)
            return Matcher(compiled.deep_copy(), limiter)

    def _read(self) -> LLTokenizer:
        with self._read_lock:
            if self._tokenizer is None:
                description = json.loads((self._path / "tokenizer.json").read_text(encoding="utf-8"))
                # Text must not contain added tokens: </answer>, which is not special, would end the answer.
                for token in description["added_tokens"]:
                    token["special"] = True
                    self._tags[token["content"]] = token["id"]
                text = json.dumps(description)
                self._tokenizer = LLTokenizer(text, n_vocab=self._vocab_size, eos_token=self._eos, slices=SLICES)
            return self._tokenizer

    def _action_rules(self, tokenizer: LLTokenizer) -> phone_action.Rules:
        with self._read_lock:
            if self._rules is None:
                added = set(self._tags.values())
                texts = (b"" if i in added else tokenizer.decode_bytes([i]) for i in range(self._vocab_size))
                self._rules = phone_action.Rules(texts, self._tags)
            return self._rules


def _compile(tokenizer: LLTokenizer, response_format: str) -> LLMatcher:
    requested = json.loads(response_format)
    if requested["type"] == "phone_action":
        grammar = LLMatcher.grammar_from_lark(phone_action.grammar())
    else:
        schema = requested["json_schema"]["schema"] if requested["type"] == "json_schema" else {"type": "object"}
        grammar = LLMatcher.grammar_from_json_schema(schema, overrides=JSON_STYLE)
    compiled = LLMatcher(tokenizer, grammar, log_level=0, limits=LLParserLimits(verbose_errors=False))
    if compiled.is_error():
        reason = compiled.get_error()
        log.info("a response_format could not be compiled: %s", reason)
        field, unsupported = "response_format.json_schema.schema", re.fullmatch(r"Unimplemented keys: \[(.*)\]", reason)
        if unsupported:
            raise invalid(field, Verbatim(unsupported[1][:200]), "made of supported keywords")
        accepted = "satisfiable, with known types, formats and references, and regular expressions without look-around"
        raise invalid(field, Verbatim("another schema"), accepted)
    return compiled


class Matcher:
    """The state of one answer in its grammar."""

    def __init__(self, state: LLMatcher, limiter: phone_action.Limiter | None) -> None:
        self.state = state
        self.limiter = limiter

    def accept(self, token_id: int) -> None:
        """Advance by one token. Raises RuntimeError if the grammar rejects it, or has failed."""
        # A grammar that has failed still accepts end-of-text tokens.
        if self.state.is_error() or not self.state.consume_token(token_id):
            raise RuntimeError(f"the grammar rejects token {token_id}: {self.state.get_error()}")
        if self.limiter is not None:
            self.limiter.accept(token_id)

    def forced(self) -> list[int]:
        """The tokens that must come next; empty if there is a choice. The state does not change."""
        return list(self.state.compute_ff_tokens())

    @property
    def done(self) -> bool:
        """Whether the answer is complete. If the grammar has failed, `accept` raises for the next token."""
        return self.state.is_stopped() and not self.state.is_error()


def token_masks(matchers: Sequence[Matcher | None], vocab_size: int) -> Int32Array:
    """The tokens that may come next.

    Returns:
        int32 [n, ceil(vocab_size / 32)]: bit t % 32 of word t // 32 allows token t; all bits are set without a matcher.
    """
    masks = np.full((len(matchers), -(-vocab_size // 32)), -1, np.int32)
    states = [(matcher.state, row) for row, matcher in enumerate(matchers) if matcher is not None]
    if states:
        _executor().unsafe_compute_mask_ptr(states, masks.ctypes.data, masks[0].nbytes, len(masks))
    for matcher, mask in zip(matchers, masks, strict=True):
        if matcher is not None and matcher.limiter is not None:
            matcher.limiter.restrict(mask)
    return masks


@cache
def _executor() -> LLExecutor:
    return LLExecutor()
