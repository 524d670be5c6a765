"""Log probabilities in OpenAI's two formats: a list of objects for chats, parallel lists for plain completions."""

import codecs
import json
from collections.abc import Iterable
from typing import Any, Literal


class OpenAILogprobs:
    """Formats the log probabilities of one choice. The server's own format is that of chats.

    A token whose `bytes` are null is not part of the text, such as the end-of-turn token.
    """

    def __init__(self, kind: Literal["chat", "text"]) -> None:
        self._kind = kind
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0

    def format(self, texts: Iterable[str]) -> dict[str, Any] | None:
        """Format the LOGPROBS of the next responses; None if all are empty."""
        items = [item for text in texts if text for item in json.loads(text)]
        if not items:
            return None
        return {"content": items, "refusal": None} if self._kind == "chat" else self._columns(items)

    def _columns(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        """`text_offset` is where each token begins in the answer, in characters. `top_logprobs` always contains the
        sampled token; of several tokens with the same text it contains the most probable."""
        offsets, tops = [], []
        for item in items:
            top: dict[str, float] = {}
            for each in (*item["top_logprobs"], item):
                top.setdefault(each["token"], each["logprob"])
            tops.append(top)
            offsets.append(self._offset)
            self._offset += len(self._decoder.decode(bytes(item["bytes"] or ())))
        return {
            "tokens": [item["token"] for item in items],
            "token_logprobs": [item["logprob"] for item in items],
            "top_logprobs": tops,
            "text_offset": offsets,
        }
