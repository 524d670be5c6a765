"""Log probabilities in OpenAI's form: bytes that concatenate to the text, and numbers that JSON can represent."""

import json
import math
from typing import Any

from autoglm.llm.sequence import TokenLogprob
from autoglm.preprocess.tokenizer import Vocabulary
from autoglm.serving.logprobs import LogprobFormatter, token_bytes
from tests.conftest import Pair


def formatted(vocabulary: Vocabulary, *logprobs: TokenLogprob) -> Any:
    return json.loads(LogprobFormatter(vocabulary).format(logprobs))


def test_bytes_concatenate_to_the_text(plain: Pair) -> None:
    vocabulary = Vocabulary(plain.checkpoint.path)
    text = '<think>a</think><answer>do(action="Type", text="打开设置 👩‍👩‍👧 née")\n'
    ids = vocabulary.tokenizer.encode(text, add_special_tokens=False).ids
    items = formatted(vocabulary, *(TokenLogprob(id_, -1.0, []) for id_ in ids))
    assert b"".join(bytes(item["bytes"]) for item in items) == text.encode()
    assert items[0]["token"] == "<think>"
    assert any(item["token"].startswith("\\x") for item in items)  # part of a character
    assert all(item["token"] in text for item in items if "\\x" not in item["token"])


def test_every_token_is_spelled_as_it_decodes(plain: Pair) -> None:
    vocabulary = Vocabulary(plain.checkpoint.path)
    for token, id_ in vocabulary.tokenizer.get_vocab().items():
        if id_ not in vocabulary.hidden:
            assert vocabulary.decode([id_]) == token_bytes(token).decode("utf-8", "replace")
    assert token_bytes("打") == "打".encode()  # an added token, outside the byte alphabet


def test_hidden_tokens_have_no_bytes(plain: Pair) -> None:
    vocabulary = Vocabulary(plain.checkpoint.path)
    end = vocabulary.tokenizer.token_to_id("<|user|>") or 0
    padding = 10**6
    (item,) = formatted(vocabulary, TokenLogprob(end, -0.5, [(end, -0.5), (padding, -7.0)]))
    assert (item["token"], item["bytes"], item["logprob"]) == ("<|user|>", None, -0.5)
    assert item["top_logprobs"][1] == {"token": "", "bytes": None, "logprob": -7.0}


def test_minus_infinity_is_a_number(plain: Pair) -> None:
    vocabulary = Vocabulary(plain.checkpoint.path)
    items = formatted(vocabulary, *(TokenLogprob(5, value, [(5, value)]) for value in (-math.inf, math.nan, -1 / 3)))
    assert [item["logprob"] for item in items] == [-9999.0, -9999.0, -0.333333]
    assert [item["top_logprobs"][0]["logprob"] for item in items] == [-9999.0, -9999.0, -0.333333]


def test_no_logprobs_are_an_empty_string(plain: Pair) -> None:
    assert LogprobFormatter(Vocabulary(plain.checkpoint.path)).format([]) == ""
