"""API keys, sizes of bodies, the number of concurrent requests, and a server that is down."""

import re
import socket
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from gateway import middleware
from gateway.app import create_app
from gateway.auth import ApiKeys
from gateway.errors import ApiError
from tests.gateway.running import configured, serve

CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}
PATH = "/v1/chat/completions"


def test_keys(grpc_url: str, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# the phones\nfirst-key   # of the farm\n\nsecond-key\n")
    with serve(create_app(grpc_url, configured(), file)) as url, httpx.Client(base_url=url) as client:
        for header, status in {
            "Bearer first-key": 200, "bearer second-key": 200, "Bearer  first-key": 200, "Bearer third": 401,
            "first-key": 401, "Basic first-key": 401, "Bearer": 401, "Bearer # the phones": 401,
        }.items():  # fmt: skip
            answer = client.post(PATH, json=CHAT, headers={"authorization": header})
            assert answer.status_code == status, header
        refused = client.get("/v1/models")
        assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")
        for headers, problem in (({}, "missing"), ({"authorization": "Bearer third"}, "invalid")):
            message = client.get("/v1/models", headers=headers).json()["error"]["message"]
            assert message == f"Authorization: {problem} API key; send 'Authorization: Bearer <key>'"
        assert refused.headers["www-authenticate"] == "Bearer"
        assert client.post("/tokenize", json={"prompt": "x"}).status_code == 401
        for path in ("/health", "/ready", "/metrics"):
            assert client.get(path).status_code == 200


def test_a_file_of_keys_must_contain_a_key(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("# nothing\n")
    with pytest.raises(ValueError, match="no API key"):
        ApiKeys(tmp_path / "keys")
    ApiKeys(None).check(None)
    with pytest.raises(ApiError):
        keys = tmp_path / "some"
        keys.write_text("a")
        ApiKeys(keys).check(None)


def test_bodies_that_are_too_large(grpc_url: str) -> None:
    with serve(create_app(grpc_url, configured(max_body_mb=1))) as url, httpx.Client(base_url=url) as client:
        large = client.post(PATH, content=bytes(2 << 20))
        assert (large.status_code, large.json()["error"]["code"]) == (413, "too_large")
        assert large.json()["error"]["message"] == "the body must be at most 1048576 bytes (got 2097152)"
        chunked = client.post(PATH, content=(bytes(1 << 18) for _ in range(8)))  # without a Content-Length
        assert chunked.status_code == 413
        message = chunked.json()["error"]["message"]
        assert re.fullmatch(r"the body must be at most 1048576 bytes \(got \d+ or more\)", message)
        assert client.post(PATH, json=CHAT).status_code == 200


def test_bodies_that_arrive_too_slowly(grpc_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(middleware, "BODY_SECONDS", 0.1)
    with serve(create_app(grpc_url, configured())) as url:
        host, _, port = url.removeprefix("http://").partition(":")
        with socket.create_connection((host, int(port)), timeout=10) as caller:
            head = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nConnection: close\r\n\r\n"
            caller.sendall(head.encode() + b"{")
            with caller.makefile("rb") as answer:
                assert answer.readline() == b"HTTP/1.1 408 Request Timeout\r\n"
                assert b"the body did not arrive within 0.1 s" in answer.read()


def test_too_many_images(any_http: httpx.Client) -> None:
    part = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    answer = any_http.post(PATH, json={"messages": [{"role": "user", "content": [part] * 11}]})
    assert answer.status_code == 400
    assert "at most 10" in answer.json()["error"]["message"]


def test_too_many_concurrent_requests(grpc_url: str) -> None:
    prompt = {"messages": [{"role": "user", "content": "endless"}]}  # the fake server's; any prompt of the real one
    long = {**prompt, "max_tokens": 3000, "ignore_eos": True, "stream": True}
    with serve(create_app(grpc_url, configured(max_requests=2))) as url, httpx.Client(base_url=url) as client:
        with client.stream("POST", PATH, json=long), client.stream("POST", PATH, json=long):
            third = client.post(PATH, json=CHAT)
            assert (third.status_code, third.headers["retry-after"]) == (429, "1")
            assert third.json()["error"]["message"] == "too many requests: at most 2 are answered at a time"
            assert client.get("/health").status_code == 200
        end = time.monotonic() + 5
        while (status := client.post(PATH, json=CHAT).status_code) == 429 and time.monotonic() < end:
            time.sleep(0.05)
        assert status == 200


def test_a_server_that_is_down() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
        with serve(create_app(address, configured())) as url, httpx.Client(base_url=url, timeout=30) as client:
            assert client.get("/health").status_code == 200
            answer = client.post(PATH, json=CHAT)
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
            assert "no server at" in answer.json()["error"]["message"]
            ready = client.get("/ready")
            assert (ready.status_code, ready.json()["error"]["code"]) == (503, "not_ready")
