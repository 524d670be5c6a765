"""Events of a streamed answer, and decoding of server-sent events."""

import json
from typing import Any

import pytest

from loadtest import http_stream
from loadtest.meter import BETWEEN, FIRST, TOTAL, Meter


@pytest.fixture
def fired(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    clock = iter([10.0, 11.0, 11.5, 13.5, 14.0])  # start, three pieces, end
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    return []


def test_a_complete_answer_has_first_between_and_total(fired: list[dict[str, Any]]) -> None:
    meter = Meter("grpc", lambda **event: fired.append(event))
    for num_tokens in (3, 1, 2):
        meter.piece(num_tokens)
    meter.end()
    seen = [(event["name"], event["response_time"]) for event in fired]
    assert seen == [(FIRST, 1000), (BETWEEN, 500), (BETWEEN, 1000), (BETWEEN, 1000), (TOTAL, 4000)]
    assert {event["request_type"] for event in fired} == {"grpc"}
    assert all(event["exception"] is None for event in fired)


def test_a_failed_answer_is_one_failure_of_total(fired: list[dict[str, Any]]) -> None:
    meter = Meter("http", lambda **event: fired.append(event))
    error = ValueError("x")
    meter.piece(1)
    meter.end(error)
    assert [(event["name"], event["exception"]) for event in fired] == [(FIRST, None), (TOTAL, error)]


def test_events_may_be_split_into_any_chunks() -> None:
    stream = b'data: {"TEXT":"\xe4\xbd\xa0"}\n\ndata: {"TEXT":"b"}\r\n\r\n'
    for size in (1, 5, 100):
        chunks = [stream[at : at + size] for at in range(0, len(stream), size)]
        assert list(http_stream.events(chunks)) == [{"TEXT": "你"}, {"TEXT": "b"}]
    assert list(http_stream.events([b'{"error":"no"}'])) == [{"error": "no"}]


def test_the_body_has_the_image_as_a_data_url() -> None:
    body = http_stream.body("打开", b"png", max_tokens=3)
    assert body["max_tokens"] == 3
    (message,) = json.loads(body["MESSAGES"])
    assert message["content"][0] == {"type": "image_url", "image_url": {"url": "data:image/png;base64,cG5n"}}
    assert message["content"][1] == {"type": "text", "text": "打开"}
