"""Whoever hangs up, or whose time is over, takes up nothing any more on the server."""

import asyncio
import json
import random
import time
from typing import Any

import httpx
import pytest

from autoglm_launcher.server import TritonServer
from gateway.app import create_app
from tests.e2e.test_ensemble import assert_idle, wait_until
from tests.e2e.triton import ask, metric
from tests.gateway.running import configured, serve
from tests.gateway.test_openai import sample, screen

LONG: dict[str, Any] = {"max_tokens": 3000, "ignore_eos": True}
HELLO: dict[str, Any] = {"messages": [{"role": "user", "content": "hello"}], **LONG}


def counted(gateway: str, name: str) -> float:
    lines = httpx.get(f"{gateway}/metrics").text.splitlines()
    return float(next(line.split()[-1] for line in lines if line.startswith(f"autoglm_gateway_{name} ")))


@pytest.fixture(autouse=True)
def nothing_is_left(server: TritonServer, gateway: str) -> Any:
    unstopped = counted(gateway, "unstopped_total")
    yield
    assert_idle(server)
    wait_until(lambda: counted(gateway, "requests_running") == 0)
    assert counted(gateway, "unstopped_total") == unstopped


def test_a_stream_that_is_left(server: TritonServer, gateway: str, http: httpx.Client) -> None:
    before = counted(gateway, "disconnects_total"), counted(gateway, "stop_seconds_count")
    with http.stream("POST", "/v1/chat/completions", json={**HELLO, "stream": True}) as response:
        next(response.iter_lines())
    left = time.monotonic()
    wait_until(lambda: counted(gateway, "stop_seconds_count") == before[1] + 1)
    assert time.monotonic() - left < 1
    assert counted(gateway, "disconnects_total") == before[0] + 1


@pytest.mark.parametrize("options", [{}, {"stream": True}, {"n": 4}, {"n": 4, "stream": True}])
def test_a_caller_who_does_not_wait(gateway: str, http: httpx.Client, options: dict[str, Any]) -> None:
    before = counted(gateway, "stop_seconds_count")
    wanted = before + options.get("n", 1)
    if options.get("stream"):
        with http.stream("POST", "/v1/chat/completions", json={**HELLO, **options}) as response:
            next(response.iter_lines())
    else:
        with pytest.raises(httpx.ReadTimeout):
            http.post("/v1/chat/completions", json={**HELLO, **options}, timeout=0.3)
    wait_until(lambda: counted(gateway, "stop_seconds_count") == wanted)


def test_callers_who_leave_the_queue(server: TritonServer, gateway: str) -> None:
    """More requests than seats: those that wait are stopped too."""

    async def leave() -> None:
        async with httpx.AsyncClient(base_url=gateway, limits=httpx.Limits(max_connections=None)) as client:
            posts = [client.post("/v1/chat/completions", json={**HELLO, "n": 4}, timeout=2) for _ in range(18)]
            ends = await asyncio.gather(*posts, return_exceptions=True)
        assert all(isinstance(end, httpx.ReadTimeout) for end in ends)

    asyncio.run(leave())
    wait_until(lambda: metric(server, "autoglm_requests_waiting") == 0)


def test_callers_who_vanish_at_random_moments(server: TritonServer, gateway: str) -> None:
    """While their request is read, queued, encoded, prefilled, streamed. Others are answered all the while."""
    chance = random.Random(0)
    body = json.dumps({"messages": screen(*sample()), "stream": True, **LONG}).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    request = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body

    async def vanish(address: str) -> None:
        host, _, port = address.removeprefix("http://").partition(":")
        await asyncio.sleep(chance.uniform(0, 2))
        _, writer = await asyncio.open_connection(host, int(port))
        writer.write(request[: chance.choice([len(request), len(request), len(request) // 2])])
        await asyncio.sleep(chance.uniform(0, 0.6))
        if chance.random() < 0.5:
            writer.transport.abort()
        writer.close()

    async def all_of_them() -> None:
        await asyncio.gather(*(vanish(gateway) for _ in range(60)))

    asyncio.run(all_of_them())
    assert ask(server, {"PROMPT": ["still there?"]}, max_tokens=3).token_ids


def test_the_time_of_a_request(http: httpx.Client) -> None:
    answer = http.post("/v1/chat/completions", json={**HELLO, "timeout": 0.3})
    assert (answer.status_code, answer.json()["error"]["code"]) == (408, "timeout")
    events = http.post("/v1/chat/completions", json={**HELLO, "stream": True, "timeout": 0.3}).text.split("\n\n")
    assert json.loads(events[0].removeprefix("data: "))["choices"]
    assert json.loads(events[-3].removeprefix("data: "))["error"]["code"] == "timeout"
    assert events[-2:] == ["data: [DONE]", ""]


def test_the_time_that_the_server_gives(server: TritonServer) -> None:
    with serve(create_app(server.grpc_url, configured(timeout_s=1))) as url, httpx.Client(base_url=url) as client:
        for options in ({}, {"timeout": 30}):
            answer = client.post("/v1/chat/completions", json={**HELLO, **options}, timeout=10)
            assert (answer.status_code, answer.json()["error"]["code"]) == (504, "timeout")
    assert_idle(server)


def test_a_gateway_that_stops_ends_its_streams(server: TritonServer) -> None:
    with serve(create_app(server.grpc_url, configured())) as url, httpx.Client(base_url=url) as client:
        response = client.send(
            client.build_request("POST", "/v1/chat/completions", json={**HELLO, "stream": True}), stream=True
        )
        lines = response.iter_lines()  # kept: with it the connection would be closed
        next(lines)
        wait_until(lambda: metric(server, "autoglm_requests_running") == 1)
    assert_idle(server)
