"""Log probabilities in OpenAI's formats, without a server."""

import json
from typing import Any

from gateway.logprobs import OpenAILogprobs


def item(token: str, content: bytes | None, logprob: float, *top: tuple[str, float]) -> dict[str, Any]:
    others = [{"token": name, "bytes": None, "logprob": value} for name, value in top]
    read = None if content is None else list(content)
    return {"token": token, "bytes": read, "logprob": logprob, "top_logprobs": others}


FIRST = [
    item("ab", b"ab", -0.5, ("ab", -0.5), ("x", -1.0)),
    item("\\xe6\\x89", b"\xe6\x89", -3.0, ("x", -1.0), ("x", -2.0)),
]
SECOND = [item("\\x93", b"\x93", -0.25), item(" c", b" c", -1.0), item("<|end|>", None, -0.125)]


def test_the_format_of_chats_is_the_servers() -> None:
    logprobs = OpenAILogprobs("chat")
    assert logprobs.format([json.dumps(FIRST), "", json.dumps(SECOND)]) == {"content": FIRST + SECOND, "refusal": None}
    assert logprobs.format([]) is logprobs.format(["", ""]) is None


def test_plain_completions_have_columns() -> None:
    whole = OpenAILogprobs("text").format([json.dumps(FIRST), json.dumps(SECOND)])
    assert whole == {
        "tokens": ["ab", "\\xe6\\x89", "\\x93", " c", "<|end|>"],
        "token_logprobs": [-0.5, -3.0, -0.25, -1.0, -0.125],
        "top_logprobs": [
            {"ab": -0.5, "x": -1.0},
            {"x": -1.0, "\\xe6\\x89": -3.0},  # of two tokens with the same text the more probable
            {"\\x93": -0.25},
            {" c": -1.0},
            {"<|end|>": -0.125},
        ],
        "text_offset": [0, 2, 2, 3, 5],  # of "ab\u6253 c"
    }


def test_offsets_continue_over_the_responses_of_a_stream() -> None:
    whole = OpenAILogprobs("text").format([json.dumps(FIRST), json.dumps(SECOND)])
    streamed = OpenAILogprobs("text")
    parts = [streamed.format([json.dumps(items)]) for items in (FIRST, SECOND)]
    assert whole and all(parts)
    assert {name: [each for part in parts if part for each in part[name]] for name in whole} == whole
