"""The openai package, as applications use it, with the gateway and a real server."""

import asyncio
import base64
import json
import re
import subprocess
from typing import Any

import httpx
import pytest
from openai import AsyncOpenAI, BadRequestError, NotFoundError, OpenAI

from autoglm_launcher.server import TritonServer
from tests.e2e.ensemble_client import ask
from tests.gateway.running import ROOT

MODEL = "autoglm-phone-9b"
SAMPLES = ROOT / "demo" / "samples"
LONG: dict[str, Any] = {"max_tokens": 40, "extra_body": {"ignore_eos": True}}
HELLO: list[Any] = [{"role": "user", "content": "hello"}]


def sample(index: int = 0) -> tuple[bytes, str]:
    entry = json.loads((SAMPLES / "samples.json").read_text(encoding="utf-8"))[index]
    return (SAMPLES / entry["image"]).read_bytes(), entry["task"]


def screen(image: bytes, text: str) -> list[Any]:
    url = f"data:image/png;base64,{base64.b64encode(image).decode()}"
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]
    return [{"role": "user", "content": parts}]


def test_answers_are_those_of_the_ensemble(server: TritonServer, openai: OpenAI) -> None:
    image, task = sample()
    chat = json.dumps([{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": task}]}])
    direct = ask(server, {"MESSAGES": [chat], "IMAGES": [image]}, temperature=0.0)
    whole = openai.chat.completions.create(model=MODEL, messages=screen(image, task), temperature=0.0)
    (choice,) = whole.choices
    assert (choice.message.role, choice.message.content) == ("assistant", direct.text)
    assert choice.finish_reason == "stop"
    assert whole.usage
    assert whole.usage.prompt_tokens == direct.usage["prompt_tokens"]
    assert whole.usage.completion_tokens == direct.usage["completion_tokens"]
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens

    chunks = list(
        openai.chat.completions.create(
            model=MODEL, messages=screen(image, task), temperature=0.0, stream=True,
            stream_options={"include_usage": True},
        )
    )  # fmt: skip
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == direct.text
    assert len(chunks) > 3
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + ["stop"]
    assert (chunks[-1].choices, chunks[-1].usage and chunks[-1].usage.prompt_tokens) == ([], whole.usage.prompt_tokens)
    assert len({chunk.id for chunk in chunks}) == 1


def test_usage_contains_stages_and_cached_tokens(openai: OpenAI) -> None:
    for _ in range(2):
        answer = openai.chat.completions.create(model=MODEL, messages=screen(*sample(1)), max_tokens=3)
    assert answer.usage
    usage = answer.usage.model_dump()
    assert usage["prompt_tokens_details"]["cached_tokens"] > 0
    assert usage["prompt_tokens_details"]["image_tokens"] > 100
    assert usage["timings"]["decode_ms"] > 0


def test_concurrent_streams(gateway: str, openai: OpenAI) -> None:
    texts = [f"question {i}" for i in range(8)]

    def chat(text: str) -> list[Any]:
        return [{"role": "user", "content": text}]

    async def streamed(client: AsyncOpenAI, text: str) -> str:
        stream = await client.chat.completions.create(model=MODEL, messages=chat(text), stream=True, **LONG)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def together() -> list[str]:
        async with AsyncOpenAI(base_url=f"{gateway}/v1", api_key="EMPTY") as client:
            return await asyncio.gather(*(streamed(client, text) for text in texts))

    alone = [
        openai.chat.completions.create(model=MODEL, messages=chat(text), **LONG).choices[0].message.content
        for text in texts
    ]
    assert asyncio.run(together()) == alone


def test_choices_differ_by_their_seeds(openai: OpenAI) -> None:
    options: dict[str, Any] = {**LONG, "temperature": 2.0, "seed": 3}
    answer = openai.chat.completions.create(model=MODEL, messages=HELLO, n=3, **options)
    texts = [choice.message.content for choice in answer.choices]
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len(set(texts)) == 3
    assert answer.usage and answer.usage.completion_tokens == 120
    streamed = ["", "", ""]
    for chunk in openai.chat.completions.create(model=MODEL, messages=HELLO, n=3, stream=True, **options):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == texts
    single = openai.chat.completions.create(model=MODEL, messages=HELLO, **{**options, "seed": 4})
    assert single.choices[0].message.content == texts[1]


def test_token_limits_and_stop_strings(openai: OpenAI) -> None:
    def create(**options: Any) -> Any:
        return openai.chat.completions.create(model=MODEL, messages=HELLO, **options).choices[0]

    whole = create(**LONG)
    short = create(max_completion_tokens=7, extra_body={"ignore_eos": True})
    assert short.finish_reason == "length"
    assert whole.message.content.startswith(short.message.content)
    mark = whole.message.content[20:25]
    for stop in (mark, ["never", mark]):
        stopped = create(stop=stop, **LONG)
        assert (stopped.message.content, stopped.finish_reason) == (whole.message.content.partition(mark)[0], "stop")


def test_sampling_options_have_an_effect(openai: OpenAI) -> None:
    def text(extra: dict[str, Any] | None = None, **options: Any) -> Any:
        body = {"ignore_eos": True, **(extra or {})}
        answer = openai.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=40, extra_body=body, **options)
        return answer.choices[0].message.content

    greedy = text()
    assert text({"top_k": 1}, temperature=5.0) == greedy
    assert text({"min_p": 1.0}, temperature=5.0) == greedy
    assert text(temperature=5.0, top_p=1e-6) == greedy
    assert text(frequency_penalty=2.0) != greedy
    assert text(presence_penalty=2.0) != greedy
    assert text({"repetition_penalty": 2.0}) != greedy
    assert text(temperature=2.0, seed=1) == text(temperature=2.0, seed=1)


def test_a_completions_prompt_is_a_users_turn(openai: OpenAI) -> None:
    chat = openai.chat.completions.create(model=MODEL, messages=HELLO, **LONG).choices[0].message.content
    whole = openai.completions.create(model=MODEL, prompt="hello", **LONG)
    assert (whole.object, whole.choices[0].text, whole.choices[0].finish_reason) == ("text_completion", chat, "length")
    stream = openai.completions.create(model=MODEL, prompt="hello", stream=True, **LONG)
    assert "".join(chunk.choices[0].text for chunk in stream) == chat


def test_models_and_tokens(openai: OpenAI, http: httpx.Client) -> None:
    assert [model.id for model in openai.models.list()] == [MODEL]
    image, task = sample()
    answer = openai.chat.completions.create(model=MODEL, messages=screen(image, task), max_tokens=1)
    tokens = http.post("/tokenize", json={"messages": screen(image, task)}).json()
    assert answer.usage and tokens["count"] == len(tokens["tokens"]) == answer.usage.prompt_tokens
    assert http.post("/tokenize", json={"prompt": "hello"}).json()["count"] < tokens["count"]


def test_errors_name_the_field(openai: OpenAI, http: httpx.Client) -> None:
    def refused(field: str, **options: Any) -> None:
        with pytest.raises(BadRequestError) as caught:
            openai.chat.completions.create(**{"model": MODEL, "messages": HELLO, **options})
        assert caught.value.param == field
        assert str(field) in caught.value.message

    refused("temperature", temperature=11)
    refused("stop", stop="")  # by the server
    refused("stop", stop="", stream=True)
    refused("n", n=5)
    refused("top_logprobs", top_logprobs=3)
    refused("top_logprobs", logprobs=True, top_logprobs=21)
    refused("response_format.type", response_format={"type": "xml"})
    wizard = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "wizard"}}}
    refused("response_format.json_schema.schema", response_format=wizard)  # by the server
    refused("max_tokens", max_tokens=5, response_format={"type": "phone_action"})
    refused("max_completion_tokens", max_completion_tokens=5, response_format={"type": "phone_action"})
    refused("max_completion_tokens", max_completion_tokens=0)
    refused("tools", tools=[{"type": "function", "function": {"name": "f", "parameters": {}}}])
    refused("service_tier", service_tier="flex")
    refused("max_tokenz", extra_body={"max_tokenz": 3})
    refused("messages[0].role", messages=[{"role": "wizard", "content": "x"}])
    refused("messages[0].content[0].image_url.url", messages=screen(b"no image", "x"))
    broken = screen(sample()[0], "x") + screen(b"\x89PNG\r\n\x1a\n", "x")
    refused("messages[1].content[0].image_url.url", messages=broken)
    clip = {"type": "input_audio", "input_audio": {"data": "@", "format": "wav"}}
    refused("messages[0].content[0].input_audio.data", messages=[{"role": "user", "content": [clip]}])
    with pytest.raises(NotFoundError) as caught:
        openai.chat.completions.create(model="another", messages=HELLO)
    assert caught.value.code == "model_not_found"
    assert http.post("/v1/chat/completions", content=b"{").status_code == 400
    assert http.get("/v1/chat/completions").status_code == 405
    assert http.get("/v1/nothing").json()["error"]["type"] == "invalid_request_error"


def test_fields_without_effect_are_accepted(openai: OpenAI) -> None:
    options: dict[str, Any] = {"user": "me", "metadata": {"a": "b"}, "store": False, "service_tier": "auto"}
    first = openai.chat.completions.create(model=MODEL, messages=HELLO, **LONG)
    again = openai.chat.completions.create(
        model=MODEL, messages=HELLO, parallel_tool_calls=True, logprobs=None, **options, **LONG
    )
    assert first.choices[0].message.content == again.choices[0].message.content
    # An answer as history, with all its null fields.
    history = [*HELLO, first.choices[0].message.model_dump(), {"role": "user", "content": "go on"}]
    assert openai.chat.completions.create(model=MODEL, messages=history, **LONG).choices[0].message.content  # type: ignore[arg-type]


def test_request_ids(http: httpx.Client) -> None:
    body = {"messages": HELLO, "max_tokens": 2}
    answer = http.post("/v1/chat/completions", json=body, headers={"x-request-id": "mine.1"})
    assert answer.headers["x-request-id"] == "mine.1"
    assert answer.json()["id"] == "chatcmpl-mine.1"
    others = [http.post("/v1/chat/completions", json=body, headers={"x-request-id": "no good"}) for _ in range(2)]
    assert len({other.headers["x-request-id"] for other in others} | {"no good"}) == 3
    assert http.post("/v1/chat/completions", json={}).headers["x-request-id"]


def test_health_readiness_and_metrics(http: httpx.Client) -> None:
    assert http.get("/health").status_code == 200
    assert http.get("/ready").status_code == 200
    http.post("/v1/chat/completions", json={"messages": HELLO, "max_tokens": 2})
    page = http.get("/metrics").text
    assert 'autoglm_gateway_requests_total{path="/v1/chat/completions",status="200"}' in page
    assert "autoglm_gateway_first_token_seconds_count" in page


def test_the_example_in_the_readme(
    gateway: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (example,) = (code for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "import OpenAI" in code)
    assert "http://127.0.0.1:8080/v1" in example
    exec(example.replace("http://127.0.0.1:8080", gateway), {})
    assert 'do(action="Tap"' in capsys.readouterr().out


def test_the_command_in_the_documentation(gateway: str) -> None:
    text = (ROOT / "docs" / "api.md").read_text("utf-8")
    (command,) = re.findall(r"^\$ (curl .*127\.0\.0\.1:8080/v1/.*)$", text, re.MULTILINE)
    command = command.replace("127.0.0.1:8080", gateway.removeprefix("http://"))
    ran = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert "do(" in json.loads(ran.stdout)["choices"][0]["message"]["content"]
