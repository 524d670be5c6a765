"""Constrained answers and log probabilities through the whole ensemble."""

import json
import math
from typing import Any

import pytest
from autoglm_client import Client, ParsedAnswer, TokenLogprob, parse

from autoglm_launcher.server import TritonServer
from loadtest.samples import read_samples
from tests.e2e.conftest import ROOT
from tests.e2e.ensemble_client import Call, ask
from tests.e2e.test_ensemble import stream_http

ACTION = json.dumps({"type": "phone_action"})
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 10},
        "count": {"type": "integer"},
        "ok": {"type": "boolean"},
    },
    "required": ["name", "count", "ok"],
    "additionalProperties": False,
}


def limited_to(schema: dict[str, Any]) -> str:
    return json.dumps({"type": "json_schema", "json_schema": {"name": "x", "schema": schema}})


def test_every_sample_is_an_action(server: TritonServer) -> None:
    """At this temperature unconstrained answers are invalid."""
    options = {"temperature": 3.0, "max_tokens": 160, "response_format": ACTION}
    calls = [Call(server, {"PROMPT": [f"task {i}"]}, {**options, "seed": i}) for i in range(16)]
    replies = [call.result() for call in calls]
    for reply in replies:
        assert reply.finish_reason == "stop"
        assert isinstance(parse(reply.text), ParsedAnswer)
        assert reply.usage["completion_tokens"] == len(reply.token_ids) <= 160
    assert len({reply.text for reply in replies}) > 10
    again = ask(server, {"PROMPT": ["task 3"]}, stream=False, seed=3, **options)
    assert (again.text, again.token_ids) == (replies[3].text, replies[3].token_ids)


def test_valid_answers_are_unchanged(server: TritonServer) -> None:
    with Client(server.grpc_url) as client:
        for task, image in read_samples(ROOT / "demo" / "samples"):
            free = client.generate(prompt=task, images=[image], temperature=0.0)
            bound = client.generate(prompt=task, images=[image], temperature=0.0, response_format=json.loads(ACTION))
            assert bound.action == free.action is not None
            assert bound.finish_reason == "stop"


def test_json_fits_its_schema(server: TritonServer) -> None:
    options = {"max_tokens": 400, "temperature": 1.5, "seed": 2, "response_format": limited_to(SCHEMA)}
    events = stream_http(server, {"PROMPT": "hello", **options})
    answer = json.loads("".join(event["TEXT"] for event in events))
    assert events[-1]["FINISH_REASON"] == "stop"
    assert list(answer) == ["name", "count", "ok"]
    assert [type(value) for value in answer.values()] == [str, int, bool]
    assert len(answer["name"]) <= 10


def test_free_and_constrained_answers_in_one_batch(server: TritonServer) -> None:
    def options(i: int) -> dict[str, Any]:
        forms: list[dict[str, Any]] = [{"ignore_eos": True}, {"response_format": ACTION}, {"logprobs": 2}]
        return {"max_tokens": 80, "temperature": 1.5, "seed": i, **forms[i % 3]}

    alone = [ask(server, {"PROMPT": [f"task {i}"]}, **options(i)).token_ids for i in range(12)]
    calls = [Call(server, {"PROMPT": [f"task {i}"]}, options(i)) for i in range(12)]
    assert [call.result().token_ids for call in calls] == alone


def test_log_probabilities_are_those_of_the_tokens(server: TritonServer) -> None:
    plain = ask(server, {"PROMPT": ["hello"]}, max_tokens=24, ignore_eos=True)
    for stream in (True, False):
        told = ask(server, {"PROMPT": ["hello"]}, max_tokens=24, ignore_eos=True, logprobs=20, stream=stream)
        assert told.token_ids == plain.token_ids
        assert len(told.logprobs) == 24
        for item in told.logprobs:
            top = item["top_logprobs"]
            assert len(top) == 20
            assert top[0] == {name: item[name] for name in ("token", "bytes", "logprob")}  # greedy
            values = [each["logprob"] for each in top]
            assert values == sorted(values, reverse=True)
            assert sum(map(math.exp, values)) <= 1.0001
        spelled = b"".join(bytes(item["bytes"] or ()) for item in told.logprobs)
        assert spelled.decode("utf-8", "replace") == plain.text
    assert plain.logprobs == []
    few = ask(server, {"PROMPT": ["hello"]}, max_tokens=4, ignore_eos=True, logprobs=0)
    assert [item["top_logprobs"] for item in few.logprobs] == [[]] * 4


def test_log_probabilities_are_the_models(server: TritonServer) -> None:
    """Neither temperature nor a grammar changes them."""
    plain = ask(server, {"PROMPT": ["hello"]}, max_tokens=1, ignore_eos=True, logprobs=20)
    warm = ask(server, {"PROMPT": ["hello"]}, max_tokens=1, ignore_eos=True, logprobs=20, temperature=2.0, seed=1)
    bound = ask(server, {"PROMPT": ["hello"]}, max_tokens=200, logprobs=20, response_format=limited_to(SCHEMA))
    for other in (warm, bound):
        for one, another in zip(plain.logprobs[0]["top_logprobs"], other.logprobs[0]["top_logprobs"], strict=True):
            assert another["token"] == one["token"]
            assert another["logprob"] == pytest.approx(one["logprob"], abs=1e-4)
    assert bound.logprobs[0]["token"].startswith("{")
    assert bound.logprobs[0]["logprob"] <= plain.logprobs[0]["logprob"]
    assert len(bound.logprobs) == len(bound.token_ids)


def test_the_client_parses_log_probabilities(server: TritonServer) -> None:
    with Client(server.grpc_url) as client, client.stream(prompt="hello", max_tokens=8, logprobs=2) as stream:
        pieces = [piece for piece in stream if piece.token_ids]
        result = stream.result()
    assert [len(piece.logprobs) for piece in pieces] == [len(piece.token_ids) for piece in pieces]
    assert all(isinstance(each, TokenLogprob) and len(each.top) == 2 for each in result.logprobs)
    assert b"".join(each.bytes or b"" for each in result.logprobs).decode("utf-8", "replace") == result.text
