"""A request whose caller disconnects, or whose gateway shuts down, is stopped on the (fake) server."""

from typing import Any

import httpx
import pytest

from gateway.app import create_app
from tests.client.fake_server import FakeServer
from tests.gateway.running import configured, metrics, serve, wait_until

CHAT = "/v1/chat/completions"


def chat(text: str, **options: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], **options}


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("stream", [False, True])
def test_a_caller_that_disconnects(api: httpx.Client, fake: FakeServer, n: int, stream: bool) -> None:
    names = ("disconnects_total", "stop_seconds_count", "unstopped_total")
    before = [metrics(api)[name] for name in names]
    first = len(fake.requests)
    body = chat("endless", n=n, stream=stream)
    if stream:
        with api.stream("POST", CHAT, json=body) as response:
            next(response.iter_lines())
    else:
        with pytest.raises(httpx.ReadTimeout):
            api.post(CHAT, json=body, timeout=0.3)
    assert len(fake.requests) == first + n
    assert all(fake.was_stopped(request.id) for request in fake.requests[first:])
    wait_until(lambda: metrics(api)["requests_running"] == 0)
    wait_until(lambda: [metrics(api)[name] for name in names] == [before[0] + 1, before[1] + n, before[2]])


def test_a_caller_that_disconnects_before_the_first_token(api: httpx.Client, fake: FakeServer) -> None:
    with pytest.raises(httpx.ReadTimeout):
        api.post(CHAT, json=chat("silent", stream=True), timeout=0.3)
    assert fake.was_stopped(fake.requests[-1].id)


def test_a_server_that_does_not_stop_in_time(api: httpx.Client, fake: FakeServer) -> None:
    before = metrics(api)["unstopped_total"]
    with pytest.raises(httpx.ReadTimeout):
        api.post(CHAT, json=chat("deaf"), timeout=0.3)
    assert fake.was_cancelled(fake.requests[-1].id)
    wait_until(lambda: metrics(api)["unstopped_total"] == before + 1)


def test_one_failed_choice_stops_the_others(api: httpx.Client, fake: FakeServer) -> None:
    first = len(fake.requests)
    with api.stream("POST", CHAT, json=chat("endless", n=2, stream=True)) as response:
        lines = response.iter_lines()
        next(lines)
        fake.stopped[fake.requests[first].id].set()  # its stream ends without a finish reason
        assert "without a finish reason" in "".join(lines)
    assert fake.was_stopped(fake.requests[first + 1].id)


def test_a_gateway_that_shuts_down(fake: FakeServer) -> None:
    with serve(create_app(fake.url, configured())) as url, httpx.Client(base_url=url) as client:
        request = client.build_request("POST", CHAT, json=chat("endless", stream=True))
        response = client.send(request, stream=True)
        lines = response.iter_lines()  # a reference: without it the connection would be closed
        next(lines)
    assert fake.was_stopped(fake.requests[-1].id)
