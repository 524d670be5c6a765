"""Structured output and log probabilities through the openai package."""

import json
from typing import Any

import httpx
import pytest
from autoglm_client import ParsedAnswer, parse
from openai import BadRequestError, OpenAI

from tests.gateway.test_openai import HELLO, LONG, MODEL, sample, screen

TAP: dict[str, Any] = {
    "type": "json_schema",
    "json_schema": {
        "name": "tap",
        "strict": True,
        "schema": {
            "type": "object",
            "properties": {"x": {"type": "integer", "minimum": 0, "maximum": 999}, "why": {"enum": ["icon", "text"]}},
            "required": ["x", "why"],
            "additionalProperties": False,
        },
    },
}


def test_json_matches_its_schema(openai: OpenAI) -> None:
    options: dict[str, Any] = {"temperature": 2.0, "max_tokens": 100, "response_format": TAP}
    for seed in range(4):
        answer = openai.chat.completions.create(model=MODEL, messages=HELLO, seed=seed, **options)
        content = json.loads(answer.choices[0].message.content or "")
        assert 0 <= content["x"] <= 999 and content["why"] in ("icon", "text") and len(content) == 2
        assert answer.choices[0].finish_reason == "stop"


def test_json_object(openai: OpenAI) -> None:
    answer = openai.chat.completions.create(
        model=MODEL, messages=HELLO, max_tokens=200, response_format={"type": "json_object"}
    )
    (choice,) = answer.choices
    assert choice.message.content and choice.message.content.lstrip().startswith("{")
    if choice.finish_reason == "stop":
        assert isinstance(json.loads(choice.message.content), dict)


def test_phone_action(openai: OpenAI) -> None:
    action: dict[str, Any] = {"extra_body": {"response_format": {"type": "phone_action"}}}
    asked: dict[str, Any] = {"model": MODEL, "messages": screen(*sample())}
    for seed in range(4):
        drawn: dict[str, Any] = {"temperature": 3.0, "seed": seed, "max_tokens": 160}
        chunks = [each.choices[0] for each in openai.chat.completions.create(stream=True, **asked, **drawn, **action)]
        assert isinstance(parse("".join(chunk.delta.content or "" for chunk in chunks)), ParsedAnswer)
        assert chunks[-1].finish_reason == "stop"
    free: Any = openai.chat.completions.create(**asked, response_format={"type": "text"})
    bound: Any = openai.chat.completions.create(**asked, **action)
    assert parse(free.choices[0].message.content) == parse(bound.choices[0].message.content)


def test_log_probabilities_of_chats(openai: OpenAI) -> None:
    options: dict[str, Any] = {"model": MODEL, "messages": HELLO, "logprobs": True, "top_logprobs": 2, **LONG}
    whole = openai.chat.completions.create(**options).choices[0]
    assert whole.logprobs and whole.logprobs.content
    content = whole.logprobs.content
    assert len(content) == 40
    assert b"".join(bytes(each.bytes or ()) for each in content).decode("utf-8", "replace") == whole.message.content
    for each in content:
        assert each.top_logprobs[0].token == each.token
        assert len(each.top_logprobs) == 2 and each.logprob == each.top_logprobs[0].logprob <= 0
    streamed: list[Any] = []
    for chunk in openai.chat.completions.create(stream=True, **options):
        (choice,) = chunk.choices
        if choice.logprobs:
            streamed += choice.logprobs.content or []
    assert [each.token for each in streamed] == [each.token for each in content]
    alone = openai.chat.completions.create(**{**options, "top_logprobs": None}).choices[0]
    assert alone.logprobs and alone.logprobs.content and alone.logprobs.content[0].top_logprobs == []
    unasked = openai.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=2).choices[0]
    assert unasked.logprobs is None


def test_every_choice_has_log_probabilities_of_its_own(openai: OpenAI) -> None:
    answer = openai.chat.completions.create(
        model=MODEL, messages=HELLO, n=2, seed=1, temperature=2.0, logprobs=True, **LONG
    )
    for choice in answer.choices:
        assert choice.logprobs and choice.logprobs.content
        spelled = b"".join(bytes(each.bytes or ()) for each in choice.logprobs.content)
        assert spelled.decode("utf-8", "replace") == choice.message.content


def test_log_probabilities_of_plain_completions(openai: OpenAI, http: httpx.Client) -> None:
    options: dict[str, Any] = {"model": MODEL, "prompt": "hello", "logprobs": 2, **LONG}
    whole = openai.completions.create(**options).choices[0]
    assert whole.logprobs and whole.logprobs.tokens and whole.logprobs.text_offset and whole.logprobs.top_logprobs
    assert len(whole.logprobs.tokens) == len(whole.logprobs.token_logprobs or ()) == 40
    for token, offset in zip(whole.logprobs.tokens, whole.logprobs.text_offset, strict=True):
        assert "\\x" in token or whole.text.startswith(token, offset)
    assert all(len(top) == 2 for top in whole.logprobs.top_logprobs)
    offsets: list[int] = []
    for chunk in openai.completions.create(stream=True, **options):
        if chunk.choices[0].logprobs:
            offsets += chunk.choices[0].logprobs.text_offset or []
    assert offsets == whole.logprobs.text_offset
    only = http.post("/v1/completions", json={"prompt": "hello", "max_tokens": 1, "logprobs": 0}).json()
    assert [len(top) for top in only["choices"][0]["logprobs"]["top_logprobs"]] == [1]
    with pytest.raises(BadRequestError) as caught:
        openai.completions.create(**{**options, "logprobs": 6})
    assert caught.value.param == "logprobs"
