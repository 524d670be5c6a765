"""Encoding of requests and decoding of responses."""

import re
from types import MappingProxyType
from typing import Any

import pytest
from autoglm_client import Cancelled, InvalidRequest, ServerError
from autoglm_client.errors import MalformedResponse
from autoglm_client.result import Response
from autoglm_client.wire import inference_request, read_response, stop_request
from PIL import Image

from tests.client.fake_server import inputs, parameters, response
from tests.client.fake_server import strings as encoded


def request(options: dict[str, Any] | None = None, **given: Any) -> Any:
    return inference_request(options or {}, **{"prompt": "hi", "stream": True, "timeout": 2.5, **given})


def test_a_prompt_with_media() -> None:
    sent = request(images=[b"a", b"b"], audio=["data:audio/wav;base64,QQ=="], request_id="mine")
    assert (sent.model_name, sent.id) == ("ensemble", "mine")
    assert inputs(sent) == {"PROMPT": [b"hi"], "IMAGES": [b"a", b"b"], "AUDIO": [b"data:audio/wav;base64,QQ=="]}
    assert parameters(sent) == {"stream": True, "timeout": 2_500_000}


def test_messages_are_json_text_or_objects() -> None:
    for messages in ('[{"role": "用"}]', [{"role": "用"}]):
        assert inputs(request(prompt=None, messages=messages)) == {"MESSAGES": ['[{"role": "用"}]'.encode()]}


def test_request_ids_are_unique_by_default() -> None:
    assert len({request().id for _ in range(10)}) == 10


def test_timeouts_are_at_least_a_microsecond() -> None:
    assert parameters(request(timeout=0))["timeout"] == 1


OPTIONS = {
    "ignore_eos": (True, True),
    "seed": (2**63 - 1, 2**63 - 1),
    "temperature": (0.5, 0.5),
    "guided_regex": ("字", "字"),
    "stop": (("a", "字"), '["a", "字"]'),
    "stop_token_ids": (range(2), "[0, 1]"),
    "response_format": (MappingProxyType({"type": "json_object"}), '{"type": "json_object"}'),
}


@pytest.mark.parametrize(("name", "value", "sent"), [(name, *pair) for name, pair in OPTIONS.items()])
def test_options_are_sent_as_parameters(name: str, value: Any, sent: Any) -> None:
    assert parameters(request({name: value}))[name] == sent


def test_unset_options_are_not_sent_and_priority_is_renamed() -> None:
    assert parameters(request({"top_p": None, "priority": 3})).keys() == {"stream", "timeout", "request_priority"}


SURROGATE = "must be valid Unicode text (got half of a surrogate pair)"
CYCLE: list[Any] = []
CYCLE.append(CYCLE)
INVALID: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"prompt": None}, {}, "exactly one of messages and prompt must be given (got neither)"),
    ({"messages": []}, {}, "exactly one of messages and prompt must be given (got both)"),
    ({"prompt": None, "messages": [{"a": {1}}]}, {}, "messages must consist of JSON values (got set)"),
    ({"prompt": None, "messages": CYCLE}, {},
     "messages must consist of JSON values without cycles, with strings as keys"),
    ({"prompt": "\ud800"}, {}, f"prompt {SURROGATE}"),
    ({"prompt": None, "messages": ["\ud800"]}, {}, f"messages {SURROGATE}"),
    ({"images": [Image.new("F", (1, 1))]}, {}, "images must have modes that PNG can store (got mode F)"),
    ({}, {"stop": "\ud800"}, f"stop {SURROGATE}"),
    ({}, {"seed": 2**63}, "seed must be a 64-bit integer (got 9223372036854775808)"),
    ({}, {"max_tokens": object()}, "max_tokens must consist of JSON values (got object)"),
    ({}, {"sequence_id": 1}, "sequence_id is not a sampling option"),
    ({}, {"triton_x": 1}, "triton_x is not a sampling option"),
]  # fmt: skip


@pytest.mark.parametrize(("given", "options", "message"), INVALID, ids=[message for *_, message in INVALID])
def test_invalid_arguments(given: dict[str, Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=f"^{re.escape(message)}$"):
        request(options, **given)


def test_media_of_other_types_are_rejected() -> None:
    with pytest.raises(TypeError, match=r"^audio must contain bytes, paths or data URLs \(got int\)$"):
        request(audio=[3])


def test_stop_requests_address_the_language_model() -> None:
    sent = stop_request("mine")
    assert (sent.model_name, sent.id, parameters(sent)) == ("autoglm_llm", "mine", {"STOP": True})


def test_responses_are_decoded() -> None:
    message = response("字", [1, -2], "stop", "{}", ["a", ""], "[]")
    assert read_response(message) == Response("字", (1, -2), "stop", "{}", ("a", ""), "[]")
    assert read_response(type(message)()) == Response()


def test_errors_in_responses_are_raised() -> None:
    message = response()
    message.error_message = "CANCELLED: stopped"
    with pytest.raises(Cancelled, match=r"^stopped$"):
        read_response(message)


@pytest.mark.parametrize("text", [b"\x09\0\0\0", b"\0", b"\x01\0\0\0\xff", encoded("a") * 2])
def test_malformed_responses(text: bytes) -> None:
    message = response()
    message.infer_response.raw_output_contents[0] = text
    with pytest.raises(MalformedResponse, match=r"^the server sent a response that cannot be decoded$"):
        read_response(message)
    message.infer_response.raw_output_contents.pop()
    with pytest.raises(ServerError):
        read_response(message)
