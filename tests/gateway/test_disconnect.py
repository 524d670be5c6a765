"""Requests whose caller disconnects, or whose timeout expires, release their resources on the server."""

import asyncio
import json
import random
import time
from typing import Any

import httpx
import pytest

from autoglm_launcher.server import TritonServer
from gateway.app import create_app
from tests.e2e.ensemble_client import ask, metric
from tests.gateway.running import configured, metrics, serve, wait_until
from tests.gateway.test_openai import sample, screen

LONG: dict[str, Any] = {"max_tokens": 3000, "ignore_eos": True}
HELLO: dict[str, Any] = {"messages": [{"role": "user", "content": "hello"}], **LONG}


def assert_idle(server: TritonServer) -> None:
    """No request runs or waits, and no KV block is held."""
    for name in ("autoglm_requests_running", "autoglm_requests_waiting", "autoglm_kv_blocks_held"):
        wait_until(lambda name=name: metric(server, name) == 0)  # type: ignore[misc]


@pytest.fixture(autouse=True)
def nothing_keeps_running(server: TritonServer, http: httpx.Client) -> Any:
    unstopped = metrics(http)["unstopped_total"]
    yield
    assert_idle(server)
    wait_until(lambda: metrics(http)["requests_running"] == 0)
    assert metrics(http)["unstopped_total"] == unstopped


def test_a_stream_that_is_closed(server: TritonServer, http: httpx.Client) -> None:
    before = metrics(http)["disconnects_total"], metrics(http)["stop_seconds_count"]
    with http.stream("POST", "/v1/chat/completions", json={**HELLO, "stream": True}) as response:
        next(response.iter_lines())
    closed = time.monotonic()
    wait_until(lambda: metrics(http)["stop_seconds_count"] == before[1] + 1)
    assert time.monotonic() - closed < 1
    assert metrics(http)["disconnects_total"] == before[0] + 1


@pytest.mark.parametrize("options", [{}, {"stream": True}, {"n": 4}, {"n": 4, "stream": True}])
def test_a_caller_that_disconnects(http: httpx.Client, options: dict[str, Any]) -> None:
    before = metrics(http)["stop_seconds_count"]
    expected = before + options.get("n", 1)
    if options.get("stream"):
        with http.stream("POST", "/v1/chat/completions", json={**HELLO, **options}) as response:
            next(response.iter_lines())
    else:
        with pytest.raises(httpx.ReadTimeout):
            http.post("/v1/chat/completions", json={**HELLO, **options}, timeout=0.3)
    wait_until(lambda: metrics(http)["stop_seconds_count"] == expected)


def test_callers_that_disconnect_while_queued(server: TritonServer, gateway: str) -> None:
    """More requests than slots: queued requests are stopped, too."""

    async def time_out() -> None:
        async with httpx.AsyncClient(base_url=gateway, limits=httpx.Limits(max_connections=None)) as client:
            posts = [client.post("/v1/chat/completions", json={**HELLO, "n": 4}, timeout=2) for _ in range(18)]
            ends = await asyncio.gather(*posts, return_exceptions=True)
        assert all(isinstance(end, httpx.ReadTimeout) for end in ends)

    asyncio.run(time_out())
    wait_until(lambda: metric(server, "autoglm_requests_waiting") == 0)


def test_callers_that_disconnect_at_random_times(server: TritonServer, gateway: str) -> None:
    """While their request is received, queued, encoded, prefilled or decoded. Other requests are answered."""
    chance = random.Random(0)
    body = json.dumps({"messages": screen(*sample()), "stream": True, **LONG}).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    request = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body

    async def disconnect(address: str) -> None:
        host, _, port = address.removeprefix("http://").partition(":")
        await asyncio.sleep(chance.uniform(0, 2))
        _, writer = await asyncio.open_connection(host, int(port))
        writer.write(request[: chance.choice([len(request), len(request), len(request) // 2])])
        await asyncio.sleep(chance.uniform(0, 0.6))
        if chance.random() < 0.5:
            writer.transport.abort()
        writer.close()

    async def disconnect_all() -> None:
        await asyncio.gather(*(disconnect(gateway) for _ in range(60)))

    asyncio.run(disconnect_all())
    assert ask(server, {"PROMPT": ["still there?"]}, max_tokens=3).token_ids


def test_the_timeout_of_a_request(http: httpx.Client) -> None:
    answer = http.post("/v1/chat/completions", json={**HELLO, "timeout": 0.3})
    assert (answer.status_code, answer.json()["error"]["code"]) == (408, "timeout")
    events = http.post("/v1/chat/completions", json={**HELLO, "stream": True, "timeout": 0.3}).text.split("\n\n")
    assert json.loads(events[0].removeprefix("data: "))["choices"]
    assert json.loads(events[-3].removeprefix("data: "))["error"]["code"] == "timeout"
    assert events[-2:] == ["data: [DONE]", ""]


def test_the_timeout_of_the_gateway(server: TritonServer) -> None:
    with serve(create_app(server.grpc_url, configured(timeout_s=1))) as url, httpx.Client(base_url=url) as client:
        for options in ({}, {"timeout": 30}):
            answer = client.post("/v1/chat/completions", json={**HELLO, **options}, timeout=10)
            assert (answer.status_code, answer.json()["error"]["code"]) == (504, "timeout")
    assert_idle(server)


def test_a_gateway_that_shuts_down_stops_its_streams(server: TritonServer) -> None:
    with serve(create_app(server.grpc_url, configured())) as url, httpx.Client(base_url=url) as client:
        response = client.send(
            client.build_request("POST", "/v1/chat/completions", json={**HELLO, "stream": True}), stream=True
        )
        lines = response.iter_lines()  # a reference: without it the connection would be closed
        next(lines)
        wait_until(lambda: metric(server, "autoglm_requests_running") == 1)
    assert_idle(server)
