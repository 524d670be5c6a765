"""Statuses, messages, codes and params of all errors."""

import json
from typing import Any

import httpx
import pytest
from autoglm_client import Cancelled, InvalidRequest, RequestTimeout, ServerError, ServerUnavailable

from autoglm.errors import ErrorCode, RequestError
from gateway.app import create_app
from gateway.errors import ApiError, from_exception
from tests.client.fake_server import FakeServer
from tests.gateway.running import configured, serve

CHAT = "/v1/chat/completions"
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}


def chat(content: Any, **options: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}], **options}


def error(response: httpx.Response) -> tuple[int, str, str | None, str | None]:
    body = response.json()["error"]
    assert body["type"] == ("invalid_request_error" if response.status_code < 500 else "server_error")
    assert ("retry-after" in response.headers) == (response.status_code in (429, 503))
    return response.status_code, body["message"], body["code"], body["param"]


@pytest.mark.parametrize(
    ("prompt", "status", "message", "code", "param"),
    [
        ("refuse:INVALID_ARGUMENT: top_p must be at most 1", 400, "top_p must be at most 1", "invalid_value", "top_p"),
        ("refuse:INVALID_ARGUMENT: MESSAGES[0].role must be x", 400, "messages[0].role must be x", "invalid_value",
         "messages[0].role"),
        ("refuse:INVALID_ARGUMENT: prompt must be x", 400, "messages must be x", "invalid_value", "messages"),
        ("refuse:INVALID_ARGUMENT: the images are odd", 400, "the images are odd", "invalid_value", None),
        ("refuse:UNAVAILABLE: the queue is full", 503, "the queue is full", "unavailable", None),
        ("refuse:RESOURCE_EXHAUSTED: no memory", 503, "no memory", "unavailable", None),
        ("refuse:Request for unknown model: 'ensemble'", 503, "the server is starting, stopping or full",
         "unavailable", None),
        ("refuse:DEADLINE_EXCEEDED: too late", 504, "too late", "timeout", None),
        ("refuse:CANCELLED: stopped", 503, "stopped", "cancelled", None),
        ("refuse:INTERNAL: lost", 500, "lost", "server_error", None),
        ("refuse:segmentation fault", 500, "the server failed", "server_error", None),
        ("fail:UNAVAILABLE:lost", 503, "the server is starting, stopping or full", "unavailable", None),
        ("fail:INTERNAL:lost", 500, "the server failed", "server_error", None),
        ("fail:INVALID_ARGUMENT:odd", 400, "the server rejected the request", "invalid_value", None),
        ("abort:UNKNOWN:lost", 500, "the server failed", "server_error", None),
        ("finish:cancelled", 503, "the request was cancelled on the server", "cancelled", None),
        ("finish:timeout", 504, "the answer was not complete within the request's timeout", "timeout", None),
    ],
)  # fmt: skip
def test_errors_of_the_server(
    api: httpx.Client, prompt: str, status: int, message: str, code: str, param: str | None
) -> None:
    expected = (status, message, code, param)
    assert error(api.post(CHAT, json=chat(prompt))) == expected
    if not prompt.startswith(("finish", "abort")):  # before the first token a stream has a status, too
        assert error(api.post(CHAT, json=chat(prompt, stream=True))) == expected


def test_texts_of_triton_and_grpc_are_only_logged(api: httpx.Client, caplog: pytest.LogCaptureFixture) -> None:
    for stream in (False, True):
        assert "secret" not in api.post(CHAT, json=chat("error:secret: core dumped", stream=stream)).text
    assert caplog.messages == ["server_error: secret: core dumped"] * 2


def test_errors_name_fields_as_the_caller_does(api: httpx.Client) -> None:
    def param(message: str, content: Any = None, **options: Any) -> str | None:
        text = {"type": "text", "text": f"refuse:INVALID_ARGUMENT: {message} must be smaller (got 5)"}
        status, said, _, param = error(api.post(CHAT, json=chat([*(content or []), text], **options)))
        assert (status, said) == (400, f"{param or message} must be smaller (got 5)")
        return param

    assert param("max_tokens") == "max_tokens"
    assert param("max_tokens", max_tokens=5) == "max_tokens"
    assert param("max_tokens", max_completion_tokens=5) == "max_completion_tokens"
    assert param("IMAGES[1]", [IMAGE, IMAGE]) == "messages[0].content[1].image_url.url"
    assert param("IMAGES", [IMAGE]) == "messages"
    assert param("MESSAGES[0].content[1].text") == "messages[0].content[1].text"
    assert param("AUDIO") == "messages"
    assert param("id") is None
    prompt = "refuse:INVALID_ARGUMENT: PROMPT must be a non-empty text"
    answer = error(api.post("/v1/completions", json={"prompt": prompt}))
    assert answer == (400, "prompt must be a non-empty text", "invalid_value", "prompt")


def test_an_error_after_the_first_token_is_the_last_event(api: httpx.Client) -> None:
    for prompt, code in (("error:INTERNAL: lost", "server_error"), ("finish:timeout", "timeout")):
        *chunks, last, done, _ = api.post(CHAT, json=chat(prompt, stream=True)).text.split("\n\n")
        assert done == "data: [DONE]"
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == code
        assert len(chunks) == 1


def test_timeouts_of_the_caller_and_of_the_gateway(api: httpx.Client, fake: FakeServer) -> None:
    status, message, code, param = error(api.post(CHAT, json=chat("finish:timeout", timeout=0.3)))
    assert (status, code, param) == (408, "timeout", "timeout")
    assert message == "timeout of 0.3 s expired before the answer was complete"
    with serve(create_app(fake.url, configured(timeout_s=1))) as url, httpx.Client(base_url=url) as client:
        for options in ({}, {"timeout": 30}):
            assert error(client.post(CHAT, json=chat("finish:timeout", **options)))[0] == 504
            assert fake.requests[-1].parameters["timeout"].int64_param == 1_000_000
        assert error(client.post(CHAT, json=chat("finish:timeout", timeout=0.5)))[0] == 408


HELLO = chat("hello")
IS_A_KNOWN_FIELD = "(accepted: role, content, name, refusal, annotations, audio, function_call, tool_calls)"
INVALID: list[tuple[dict[str, Any], str, str | None]] = [
    ({}, "messages is missing", "messages"),
    ({"messages": []}, "messages must be a non-empty list (got an empty list)", "messages"),
    ({"messages": "hello"}, "messages must be a list (got 'hello')", "messages"),
    ({"messages": [5]}, "messages[0] must be an object (got 5)", "messages[0]"),
    ({"messages": [{"role": "user"}]}, "messages[0].content is missing", "messages[0].content"),
    ({"messages": [{**HELLO["messages"][0], "foo": 1}]}, f"messages[0].foo is not a known field {IS_A_KNOWN_FIELD}",
     "messages[0].foo"),
    ({"messages": [{**HELLO["messages"][0], "name": "x"}]}, "messages[0].name must be null (got 'x')",
     "messages[0].name"),
    (chat(5), "messages[0].content must be a string or a list (got 5)", "messages[0].content"),
    (chat([]), "messages[0].content must be a string or a non-empty list (got an empty list)", "messages[0].content"),
    (chat([5]), "messages[0].content[0] must be an object (got 5)", "messages[0].content[0]"),
    (chat([{}]), "messages[0].content[0].type is missing", "messages[0].content[0].type"),
    (chat([{"type": "video"}]),
     "messages[0].content[0].type must be one of text, image_url, input_audio (got 'video')",
     "messages[0].content[0].type"),
    (chat([{"type": ["text"]}]),
     "messages[0].content[0].type must be one of text, image_url, input_audio (got a list of 1)",
     "messages[0].content[0].type"),
    (chat([{"type": "text"}]), "messages[0].content[0].text is missing", "messages[0].content[0].text"),
    (chat([{"type": "text", "text": 5}]), "messages[0].content[0].text must be a string (got 5)",
     "messages[0].content[0].text"),
    (chat([{"type": "image_url", "image_url": {"url": None}}]),
     "messages[0].content[0].image_url.url must be a string (got null)", "messages[0].content[0].image_url.url"),
    (chat([{"type": "image_url", "image_url": {"url": "x", "detail": "low"}}]),
     "messages[0].content[0].image_url.detail must be one of auto, high (got 'low')",
     "messages[0].content[0].image_url.detail"),
    ({**HELLO, "temperature": "hot"}, "temperature must be a number between 0 and 10 (got 'hot')", "temperature"),
    ({**HELLO, "temperature": float("nan")}, "temperature must be a number between 0 and 10 (got NaN)", "temperature"),
    ({**HELLO, "temperature": float("inf")}, "temperature must be between 0 and 10 (got Infinity)", "temperature"),
    ({**HELLO, "top_k": 1.5}, "top_k must be an integer between 0 and 2147483647 (got 1.5)", "top_k"),
    ({**HELLO, "max_tokens": True}, "max_tokens must be an integer between 1 and 2147483647 (got true)", "max_tokens"),
    ({**HELLO, "max_completion_tokens": 0}, "max_completion_tokens must be between 1 and 2147483647 (got 0)",
     "max_completion_tokens"),
    ({**HELLO, "seed": 10**400}, f"seed must be between 0 and {2**63 - 1} (got {'1':0<77}...)", "seed"),
    ({**HELLO, "ignore_eos": "yes"}, "ignore_eos must be true or false (got 'yes')", "ignore_eos"),
    ({**HELLO, "stop": 5}, "stop must be a string or a list (got 5)", "stop"),
    ({**HELLO, "stop": ["x", 5]}, "stop[1] must be a string (got 5)", "stop[1]"),
    ({**HELLO, "stop": "\ud800"}, "stop must be", "stop"),
    ({**HELLO, "n": 0}, "n must be between 1 and 4 (got 0)", "n"),
    ({**HELLO, "n": "all"}, "n must be an integer between 1 and 4 (got 'all')", "n"),
    ({**HELLO, "timeout": 0}, "timeout must be above 0 and at most 86400 (got 0)", "timeout"),
    ({**HELLO, "top_logprobs": 3}, "top_logprobs must be 0 or absent unless logprobs is true (got 3)", "top_logprobs"),
    ({**HELLO, "logprobs": True, "top_logprobs": 21}, "top_logprobs must be between 0 and 20 (got 21)", "top_logprobs"),
    ({**HELLO, "max_tokens": 1, "max_completion_tokens": 2},
     "max_completion_tokens must be equal to max_tokens where both are present (got 2 and 1)",
     "max_completion_tokens"),
    ({**HELLO, "stream_options": {}}, "stream_options must be absent unless stream is true", "stream_options"),
    ({**HELLO, "stream": True, "stream_options": {"include_obfuscation": True}},
     "stream_options.include_obfuscation must be false (got true)", "stream_options.include_obfuscation"),
    ({**HELLO, "response_format": {"type": "xml"}},
     "response_format.type must be one of text, json_object, json_schema, phone_action (got 'xml')",
     "response_format.type"),
    ({**HELLO, "response_format": {"type": "json_schema", "json_schema": {"schema": []}}},
     "response_format.json_schema.schema must be an object (got an empty list)",
     "response_format.json_schema.schema"),
    ({**HELLO, "response_format": {"type": "json_object", "foo": 1}},
     "response_format.foo is not a known field (accepted: type)", "response_format.foo"),
    ({**HELLO, "tools": [{}]}, "tools must be empty (got a list of 1)", "tools"),
    ({**HELLO, "logit_bias": {"5": 1}}, "logit_bias must be empty (got an object)", "logit_bias"),
    ({**HELLO, "metadata": ["x"]}, "metadata must be an object (got a list of 1)", "metadata"),
    ({**HELLO, "modalities": ["text", "text"]}, "modalities must be a list of at most 1 (got a list of 2)",
     "modalities"),
    ({**HELLO, "modalities": ["audio"]}, "modalities[0] must be text (got 'audio')", "modalities[0]"),
    ({**HELLO, "service_tier": "flex"}, "service_tier must be one of auto, default (got 'flex')", "service_tier"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "message", "param"), INVALID, ids=[message for _, message, _ in INVALID])
def test_invalid_bodies(api: httpx.Client, body: dict[str, Any], message: str, param: str | None) -> None:
    answer = api.post(CHAT, content=json.dumps(body), headers={"content-type": "application/json"})
    code = "missing" if "is missing" in message else "unknown_field" if "known field" in message else "invalid_value"
    status, said, *rest = error(answer)
    assert (status, rest) == (400, [code, param])
    assert said == message or (message == "stop must be" and "surrogate" in said)


def test_the_range_of_logprobs_depends_on_the_endpoint(api: httpx.Client) -> None:
    answer = error(api.post("/v1/completions", json={"prompt": "x", "logprobs": 6}))
    assert answer == (400, "logprobs must be between 0 and 5 (got 6)", "invalid_value", "logprobs")
    assert error(api.post(CHAT, json={**HELLO, "logprobs": 6}))[1] == "logprobs must be true or false (got 6)"


def test_unknown_fields_list_the_accepted_ones(api: httpx.Client) -> None:
    status, message, code, param = error(api.post(CHAT, json={**HELLO, "max tokenz": 3}))
    assert (status, code, param) == (400, "unknown_field", "max tokenz")
    assert message.startswith("max tokenz is not a known field (accepted: ")
    assert {"max_tokens", "temperature", "messages", "audio_mode"} <= set(message[:-1].split(": ")[1].split(", "))


def test_bodies_that_are_no_json_object(api: httpx.Client) -> None:
    json_type = {"content-type": "application/json"}
    assert (
        error(api.post(CHAT, content=b"[]", headers=json_type))[1] == "the body must be an object (got an empty list)"
    )
    assert error(api.post(CHAT, headers=json_type)) == (400, "the body is missing", "missing", None)
    assert error(api.post(CHAT, content=b"{", headers=json_type)) == (
        400, "the body is not valid JSON: error at character 1", "not_json", None
    )  # fmt: skip
    for content, headers in ((b"{}", {"content-type": "text/plain"}), (b"{}", {})):
        answer = error(api.post(CHAT, content=content, headers=headers))
        assert answer == (400, "the body must be sent with Content-Type: application/json", "not_json", None)
    exactly_one = (400, "exactly one of messages and prompt must be present", "invalid_value", None)
    assert error(api.post("/tokenize", json={})) == exactly_one
    assert error(api.post("/tokenize", json={**HELLO, "prompt": "x"})) == exactly_one


def test_paths_methods_and_models(api: httpx.Client) -> None:
    assert error(api.get("/v1/nothing")) == (404, "no such path: /v1/nothing", None, None)
    assert error(api.get(CHAT)) == (405, f"{CHAT} does not allow GET", None, None)
    for path, body in ((CHAT, HELLO), ("/v1/completions", {"prompt": "x"}), ("/tokenize", {"prompt": "x"})):
        message = "model must be autoglm-phone-9b (got 'another')"
        answer = error(api.post(path, json={**body, "model": "another"}))
        assert answer == (404, message, "model_not_found", "model")


def test_errors_of_tokenize(api: httpx.Client) -> None:
    answer = error(api.post("/tokenize", json={"prompt": "fail:INVALID_ARGUMENT:INVALID_ARGUMENT: PROMPT must be x"}))
    assert answer == (400, "prompt must be x", "invalid_value", "prompt")
    for details, message in (
        ("UNAVAILABLE: the queue is full", "the queue is full"),
        ("gone", "the server is starting, stopping or full"),
    ):
        answer = error(api.post("/tokenize", json={"prompt": f"fail:UNAVAILABLE:{details}"}))
        assert answer == (503, message, "unavailable", None)


def test_statuses_by_exception() -> None:
    for fault, status in {
        ServerUnavailable("the queue is full"): 503, ServerError("broken"): 500, Cancelled("stopped"): 503,
        KeyError("secret"): 500, ApiError(418, "tea"): 418, RequestTimeout("late"): 504, InvalidRequest("no"): 400,
        RequestError("no"): 400, RequestError("later", ErrorCode.UNAVAILABLE): 503,
    }.items():  # fmt: skip
        converted = from_exception(fault, {})
        assert converted.status == status
        assert "secret" not in converted.message
        assert ("retry-after" in converted.response().headers) == (status == 503)


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ("max_tokens must be between 1 and 2147483647 (got -1)", "max_tokens"),
        ("messages[0].content[1].image_url.url could not be fetched: HTTP 404", "messages[0].content[1].image_url.url"),
        ("seed: broken", "seed"),
        ("the stream ended", None),
        ("temperature", None),
        ("", None),
    ],
)
def test_param_is_a_field_of_requests(message: str, param: str | None) -> None:
    assert from_exception(RequestError(message), {}).param == param
    assert from_exception(ServerError(message), {}).param is None
