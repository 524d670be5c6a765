"""Responses in OpenAI's format, without a server."""

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

from autoglm_client.result import Response

from gateway.errors import ApiError
from gateway.responses import DONE, CompletionUsage, EventStreamResponse, ResponseBuilder

USAGE = json.dumps({"prompt_tokens": 3, "completion_tokens": 2, "cached_tokens": 0})


async def responses() -> AsyncGenerator[list[tuple[int, Response]], None]:
    yield [(0, Response("a")), (1, Response("b"))]
    yield [(0, Response())]  # a token that is an incomplete character
    yield [
        (1, Response("c", finish_reason="length", usage=USAGE)),
        (0, Response("d", finish_reason="stop", usage=USAGE)),
    ]


def test_a_batch_is_written_in_one_piece() -> None:
    async def collect() -> list[bytes]:
        return [each async for each in ResponseBuilder("text", "id", "model").events(responses())]

    first, second, last = asyncio.run(collect())
    choices = [[json.loads(event[6:])["choices"][0] for event in each.split(b"\n\n")[:-1]] for each in (first, second)]
    assert [[(choice["index"], choice["text"]) for choice in each] for each in choices] == [
        [(0, "a"), (1, "b")],
        [(1, "c"), (0, "d")],
    ]
    assert last == DONE


def test_a_whole_response_joins_texts_by_choice() -> None:
    whole = asyncio.run(ResponseBuilder("text", "id", "model").whole(responses()))
    assert [(c["text"], c["finish_reason"]) for c in whole["choices"]] == [("ad", "stop"), ("bc", "length")]
    assert whole["usage"]["completion_tokens"] == 4


def test_usage_adds_up_the_choices() -> None:
    usage = CompletionUsage()
    usage.add(json.dumps({"prompt_tokens": 3, "completion_tokens": 2, "cached_tokens": 0, "prefill_ms": 1.5, "x": 1}))
    usage.add(json.dumps({"prompt_tokens": 3, "completion_tokens": 5, "cached_tokens": 2, "prefill_ms": 9.0}))
    assert usage.to_dict() == {
        "prompt_tokens": 3,
        "completion_tokens": 7,
        "total_tokens": 10,
        "prompt_tokens_details": {"cached_tokens": 2, "image_tokens": 0, "audio_tokens": 0},
        "timings": {"prefill_ms": 1.5},
    }


def test_an_error_becomes_the_last_event() -> None:
    sent: list[bytes] = []

    async def events() -> AsyncGenerator[bytes, None]:
        yield b"second"
        raise ApiError(500, "lost", "server_error")

    async def send(message: Any) -> None:
        sent.append(message.get("body"))

    asyncio.run(EventStreamResponse(events(), b"first")({}, None, send))  # type: ignore[arg-type]
    assert sent[:3] == [None, b"first", b"second"]
    event, done, _ = sent[3].split(b"\n\n")
    assert json.loads(event.removeprefix(b"data: "))["error"]["message"] == "lost"
    assert (done + b"\n\n", sent[4:]) == (DONE, [b""])
