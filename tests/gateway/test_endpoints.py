"""All endpoints in front of a fake server: what it receives, and what callers get."""

import base64
import json
from typing import Any

import httpx
import pytest

from autoglm.preprocess.options import Boolean, Choice, Integer, Number, Option, Strings, TokenIds
from gateway.schema import OPTIONS
from tests.client.fake_server import ANSWER, LOGPROBS, FakeServer, inputs, parameters
from tests.gateway.running import metrics, wait_until

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
TEXT = "".join(ANSWER)


def chat(text: str, *parts: dict[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": [*parts, {"type": "text", "text": text}] if parts else text}]}


def events(response: httpx.Response) -> list[Any]:
    """The events of a stream, without its end, which is checked."""
    assert response.headers["content-type"].startswith("text/event-stream")
    *chunks, done, rest = response.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    return [json.loads(chunk.removeprefix("data: ")) for chunk in chunks]


def test_chat(api: httpx.Client, fake: FakeServer) -> None:
    answer = api.post(CHAT, json=chat("打开设置")).json()
    assert answer["object"] == "chat.completion"
    assert answer["choices"] == [
        {"index": 0, "message": {"role": "assistant", "content": TEXT}, "logprobs": None, "finish_reason": "stop"}
    ]
    assert answer["usage"] == {
        "prompt_tokens": 40,
        "completion_tokens": 12,
        "total_tokens": 52,
        "prompt_tokens_details": {"cached_tokens": 8, "image_tokens": 32, "audio_tokens": 0},
        "timings": {"decode_ms": 1.5},
    }
    sent = fake.requests[-1]
    assert json.loads(inputs(sent)["MESSAGES"][0]) == [{"role": "user", "content": "打开设置"}]
    assert parameters(sent) == {"stream": False, "timeout": 600_000_000}


def test_chat_stream(api: httpx.Client, fake: FakeServer) -> None:
    body = {**chat("打开设置"), "stream": True, "stream_options": {"include_usage": True}}
    *chunks, end, usage = events(api.post(CHAT, json=body))
    assert [chunk["choices"][0]["delta"]["content"] for chunk in chunks] == ANSWER
    assert [chunk["choices"][0]["delta"].get("role") for chunk in chunks] == ["assistant"] + [None] * 5
    assert {chunk["object"] for chunk in (*chunks, end, usage)} == {"chat.completion.chunk"}
    assert {chunk["usage"] for chunk in (*chunks, end)} == {None}
    assert (end["choices"][0]["delta"], end["choices"][0]["finish_reason"]) == ({"content": ""}, "stop")
    assert (usage["choices"], usage["usage"]["completion_tokens"]) == ([], 12)
    assert parameters(fake.requests[-1])["stream"] is True
    assert "usage" not in events(api.post(CHAT, json={**chat("x"), "stream": True}))[-1]


def test_completions(api: httpx.Client, fake: FakeServer) -> None:
    answer = api.post(COMPLETIONS, json={"prompt": "hello"}).json()
    assert (answer["object"], answer["id"][:5]) == ("text_completion", "cmpl-")
    assert answer["choices"] == [{"index": 0, "text": TEXT, "logprobs": None, "finish_reason": "stop"}]
    assert inputs(fake.requests[-1]) == {"PROMPT": [b"hello"]}
    chunks = events(api.post(COMPLETIONS, json={"prompt": "hello", "stream": True}))
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == TEXT


def test_choices_have_different_seeds(api: httpx.Client) -> None:
    answer = api.post(CHAT, json={**chat("parameters"), "n": 3, "seed": 5}).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert [json.loads(choice["message"]["content"])["seed"] for choice in answer["choices"]] == [5, 6, 7]
    assert (answer["usage"]["prompt_tokens"], answer["usage"]["completion_tokens"]) == (40, 36)
    texts = ["", "", "", ""]
    for chunk in events(api.post(CHAT, json={**chat("hello"), "n": 4, "stream": True})):
        texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["delta"]["content"]
    assert texts == [TEXT] * 4


def a_value(option: Option) -> Any:
    """A value of an option that is not its default."""
    kind = option.kind
    if isinstance(kind, Boolean):
        return not option.default
    if isinstance(kind, (Integer, Number)):
        return kind.high
    if isinstance(kind, Choice):
        return kind.values[-1]
    assert isinstance(kind, (Strings, TokenIds))
    return ["x", "y"] if isinstance(kind, Strings) else [1, 2]


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_is_sent(api: httpx.Client, fake: FakeServer, name: str) -> None:
    value = a_value(OPTIONS[name])
    for path, body in ((CHAT, chat("hello")), (COMPLETIONS, {"prompt": "hello"})):
        assert api.post(path, json={**body, name: value}).status_code == 200
        sent = parameters(fake.requests[-1])
        expected = json.dumps(value) if isinstance(value, list) else value
        assert {key for key, each in sent.items() if each == expected} & {name, *OPTIONS[name].aliases}


def test_converted_options(api: httpx.Client, fake: FakeServer) -> None:
    def sent(path: str, **options: Any) -> dict[str, Any]:
        body = chat("hello") if path == CHAT else {"prompt": "hello"}
        assert api.post(path, json={**body, **options}).status_code == 200
        return {
            name: value for name, value in parameters(fake.requests[-1]).items() if name not in ("stream", "timeout")
        }

    api.post(CHAT, json={**chat("hello"), "timeout": 2.5})
    assert parameters(fake.requests[-1])["timeout"] == 2_500_000
    assert sent(CHAT, stop="[x") == {"stop": '["[x"]'}
    assert sent(CHAT, stop=[]) == {}
    assert sent(CHAT, temperature=None, n=None, stop=None) == {}
    assert sent(CHAT, max_completion_tokens=7) == {"max_tokens": 7}
    assert sent(CHAT, max_completion_tokens=7, max_tokens=7) == {"max_tokens": 7}
    assert sent(CHAT, logprobs=True) == {"logprobs": 0}
    assert sent(CHAT, logprobs=True, top_logprobs=3) == {"logprobs": 3}
    assert sent(CHAT, logprobs=False) == {}
    assert sent(COMPLETIONS, logprobs=2) == {"logprobs": 2}
    assert sent(CHAT, response_format={"type": "phone_action"}) == {"response_format": '{"type": "phone_action"}'}
    schema = {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": {"maximum": 1e400}}}
    sent_schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"maximum": float("inf")}}}
    text = json.dumps({**chat("hello"), "response_format": schema}).replace("Infinity", "1e400")
    assert api.post(CHAT, content=text, headers={"content-type": "application/json"}).status_code == 200
    assert json.loads(parameters(fake.requests[-1])["response_format"]) == sent_schema


def test_fields_without_effect(api: httpx.Client, fake: FakeServer) -> None:
    ignored = {
        "user": "me",
        "metadata": {"a": "b"},
        "store": False,
        "service_tier": "auto",
        "tools": [],
        "logit_bias": {},
    }
    history = {"role": "assistant", "content": "x", "refusal": None, "tool_calls": None, "audio": None}
    body = {"messages": [history, {"role": "user", "content": "hello"}], "parallel_tool_calls": True, **ignored}
    assert api.post(CHAT, json=body).status_code == 200
    assert set(parameters(fake.requests[-1])) == {"stream", "timeout"}


def test_images_audio_and_transcripts(api: httpx.Client, fake: FakeServer) -> None:
    image, clip = base64.b64encode(b"image file").decode(), base64.b64encode(b"clip").decode()
    body = chat(
        "hello",
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{image}"}},
        {"type": "input_audio", "input_audio": {"data": clip, "format": "wav"}},
    )
    assert api.post(CHAT, json=body).json()["transcripts"] == ["4 bytes"]
    sent = inputs(fake.requests[-1])
    assert (sent["IMAGES"], sent["AUDIO"]) == ([b"image file"], [b"clip"])
    content = [{"type": "image"}, {"type": "audio"}, {"type": "text", "text": "hello"}]
    assert json.loads(sent["MESSAGES"][0]) == [{"role": "user", "content": content}]
    first, *others = events(api.post(CHAT, json={**body, "stream": True}))
    assert first["transcripts"] == ["4 bytes"]
    assert not any("transcripts" in chunk for chunk in others)


def test_log_probabilities(api: httpx.Client) -> None:
    whole = api.post(CHAT, json={**chat("hello"), "logprobs": True}).json()
    assert whole["choices"][0]["logprobs"] == {"content": LOGPROBS, "refusal": None}
    chunks = events(api.post(COMPLETIONS, json={"prompt": "hello", "logprobs": 1, "stream": True}))
    assert [chunk["choices"][0]["logprobs"]["text_offset"] for chunk in chunks[:-1]] == [
        [2 * number, 2 * number + 2] for number in range(len(ANSWER))
    ]


def test_tokenize(api: httpx.Client, fake: FakeServer) -> None:
    assert api.post("/tokenize", json={"prompt": "ab"}).json() == {"count": 2, "tokens": [97, 98]}
    assert api.post("/tokenize", json=chat("abc")).json()["tokens"] == [97, 98, 99]
    assert [each.name for each in fake.requests[-1].outputs] == ["PROMPT_IDS"]


def test_models(api: httpx.Client) -> None:
    [model] = api.get("/v1/models").json()["data"]
    assert (model["id"], model["object"]) == ("autoglm-phone-9b", "model")
    assert api.post(CHAT, json={**chat("hello"), "model": model["id"]}).json()["model"] == model["id"]


def test_request_ids(api: httpx.Client, fake: FakeServer) -> None:
    answer = api.post(CHAT, json=chat("hello"), headers={"x-request-id": "mine.1"})
    assert (answer.headers["x-request-id"], answer.json()["id"]) == ("mine.1", "chatcmpl-mine.1")
    first = fake.requests[-1].id
    api.post(CHAT, json=chat("hello"), headers={"x-request-id": "mine.1"})
    assert first.startswith("mine.1/") and fake.requests[-1].id.startswith("mine.1/")
    assert first != fake.requests[-1].id  # two requests with the same id can be stopped separately
    invalid = [api.post(CHAT, json={}, headers={"x-request-id": "no good"}).headers["x-request-id"] for _ in range(2)]
    assert len({*invalid, "no good"}) == 3


def test_health_readiness_and_metrics(api: httpx.Client) -> None:
    assert api.get("/health").json() == {"status": "alive"}
    assert api.get("/ready").json() == {"status": "ready"}

    answered, refused = (f'requests_total{{path="{CHAT}",status="{status}"}}' for status in (200, 400))
    wait_until(lambda: metrics(api)["requests_running"] == 0)
    before = metrics(api)
    api.post(CHAT, json=chat("hello"))
    api.post(CHAT, json={})
    wait_until(lambda: metrics(api).get(refused, 0) == before.get(refused, 0) + 1)
    after = metrics(api)
    assert after[answered] == before.get(answered, 0) + 1
    for name, step in (("prompt_tokens_total", 40), ("completion_tokens_total", 12), ("first_token_seconds_count", 1)):
        assert after[name] == before[name] + step
    assert after["requests_running"] == 0
