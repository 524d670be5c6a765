"""Log probabilities in OpenAI's two shapes: a list of objects for chats, lists side by side for plain completions."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable
from typing import Any, Literal


class Logprobs:
    """Those of one choice. What the server tells has the chat's shape already.

    A token whose bytes are null shows nowhere in the text, such as the one that ends it.
    """

    def __init__(self, kind: Literal["chat", "text"]) -> None:
        self._kind = kind
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0

    def shape(self, told: Iterable[str]) -> dict[str, Any] | None:
        """What the LOGPROBS of the next responses say; None where none of them has any."""
        items = [item for text in told if text for item in json.loads(text)]
        if not items:
            return None
        return {"content": items, "refusal": None} if self._kind == "chat" else self._columns(items)

    def _columns(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        """`text_offset` is where in the answer each token begins, in characters. A chosen token is always among its
        `top_logprobs`; of several that are spelled alike the most probable is."""
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
