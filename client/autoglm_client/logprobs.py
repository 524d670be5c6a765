"""Log probabilities of tokens, decoded from the server's LOGPROBS."""

import json
from dataclasses import dataclass
from typing import Any

from autoglm_client.errors import MalformedResponse


@dataclass(frozen=True)
class Alternative:
    """A token and its natural log probability. `bytes` is its part of the text in UTF-8, None if it never appears there
    (such as the end-of-sequence token); `token` is printable."""

    token: str
    bytes: bytes | None
    logprob: float


@dataclass(frozen=True)
class TokenLogprob(Alternative):
    """A sampled token, and the most probable tokens at its position, highest first."""

    top: tuple[Alternative, ...]


def read_logprobs(text: str) -> tuple[TokenLogprob, ...]:
    """Decode LOGPROBS, which is empty unless requested. Raises MalformedResponse."""
    if not text:
        return ()
    try:
        return tuple(
            TokenLogprob(*_read(item), tuple(Alternative(*_read(each)) for each in item["top_logprobs"]))
            for item in json.loads(text)
        )
    except (ValueError, TypeError, KeyError) as error:
        raise MalformedResponse(f"LOGPROBS must be a list of tokens (got {text[:80]!r})") from error


def _read(item: Any) -> tuple[str, bytes | None, float]:
    return item["token"], None if item["bytes"] is None else bytes(item["bytes"]), item["logprob"]
