"""Log probabilities as JSON, in the form of OpenAI's `logprobs.content`."""

import json
from collections.abc import Sequence
from typing import Any

from autoglm.llm.sequence import TokenLogprob
from autoglm.preprocess.tokenizer import Vocabulary

MIN_LOGPROB = -9999.0  # OpenAI's value for minus infinity, which JSON cannot represent


class LogprobFormatter:
    """Spells tokens with a checkpoint's byte-level vocabulary.

    `bytes` are a token's part of the answer's text in UTF-8; null for a token that is not part of it, such as the one
    that ends it. `token` is the same as text, with `\\xe8` for a byte of an incomplete character.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary

    def format(self, logprobs: Sequence[TokenLogprob]) -> str:
        """A JSON list with an item for each token; an empty string for none."""
        if not logprobs:
            return ""
        items = [
            {**self._item(each.token_id, each.logprob), "top_logprobs": [self._item(*pair) for pair in each.top]}
            for each in logprobs
        ]
        return json.dumps(items, ensure_ascii=False, separators=(",", ":"))

    def _item(self, token_id: int, logprob: float) -> dict[str, Any]:
        logprob = round(logprob, 6) if logprob > MIN_LOGPROB else MIN_LOGPROB
        return {**self._spell(token_id), "logprob": logprob}

    def _spell(self, token_id: int) -> dict[str, Any]:
        token = self._vocabulary.tokenizer.id_to_token(token_id)
        if token is None or token_id in self._vocabulary.hidden:  # None: padding of the vocabulary
            return {"token": token or "", "bytes": None}
        content = token_bytes(token)
        return {"token": content.decode("utf-8", "backslashreplace"), "bytes": list(content)}


def token_bytes(token: str) -> bytes:
    """The bytes of a byte-level token. A token with a character outside the alphabet is used as is, as in
    tokenizers' own decoder."""
    try:
        return bytes(_BYTES[character] for character in token)
    except KeyError:
        return token.encode()


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 bytes map to themselves, the others to the characters from 256, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTES = _byte_alphabet()
