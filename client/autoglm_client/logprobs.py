"""How sure the model was of each token: the server's LOGPROBS, read."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from autoglm_client.errors import Unreadable


@dataclass(frozen=True)
class Alternative:
    """A token and the natural logarithm of its probability. `bytes` are its part of the text in UTF-8, None for a token
    that never shows there, such as the one that ends it; `token` is the same to look at."""

    token: str
    bytes: bytes | None
    logprob: float


@dataclass(frozen=True)
class TokenLogprob(Alternative):
    """A token of the answer, and the most probable tokens in its place, highest first."""

    top: tuple[Alternative, ...]


def read_logprobs(text: str) -> tuple[TokenLogprob, ...]:
    """Read LOGPROBS, empty where none were asked for. Raises Unreadable when it is of another form."""
    if not text:
        return ()
    try:
        return tuple(
            TokenLogprob(*_read(item), tuple(Alternative(*_read(each)) for each in item["top_logprobs"]))
            for item in json.loads(text)
        )
    except (ValueError, TypeError, KeyError):
        raise Unreadable(f"LOGPROBS is no list of tokens: {text[:80]!r}") from None


def _read(item: Any) -> tuple[str, bytes | None, float]:
    return item["token"], None if item["bytes"] is None else bytes(item["bytes"]), item["logprob"]
