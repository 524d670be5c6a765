"""Keys, sizes, how many at once, and a server that is full or gone."""

import socket
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from autoglm_client import Cancelled, ServerError, ServerUnavailable

from autoglm_launcher.server import TritonServer
from gateway.app import create_app
from gateway.auth import Keys
from gateway.errors import ApiError, from_fault
from tests.gateway.running import configured, serve

CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}
PATH = "/v1/chat/completions"


def test_keys(server: TritonServer, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# the phones\nfirst-key   # of the farm\n\nsecond-key\n")
    with serve(create_app(server.grpc_url, configured(), file)) as url, httpx.Client(base_url=url) as client:
        for header, status in {
            "Bearer first-key": 200, "bearer second-key": 200, "Bearer  first-key": 200, "Bearer third": 401,
            "first-key": 401, "Basic first-key": 401, "Bearer": 401, "Bearer # the phones": 401,
        }.items():  # fmt: skip
            answer = client.post(PATH, json=CHAT, headers={"authorization": header})
            assert answer.status_code == status, header
        refused = client.get("/v1/models")
        assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")
        assert refused.headers["www-authenticate"] == "Bearer"
        assert client.post("/tokenize", json={"prompt": "x"}).status_code == 401
        for path in ("/health", "/ready", "/metrics"):
            assert client.get(path).status_code == 200


def test_a_file_of_keys_holds_some(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("# nothing\n")
    with pytest.raises(ValueError, match="no key"):
        Keys(tmp_path / "keys")
    Keys(None).check(None)
    with pytest.raises(ApiError):
        keys = tmp_path / "some"
        keys.write_text("a")
        Keys(keys).check(None)


def test_bodies_that_are_too_large(server: TritonServer) -> None:
    with serve(create_app(server.grpc_url, configured(max_body_mb=1))) as url, httpx.Client(base_url=url) as client:
        large = client.post(PATH, content=bytes(2 << 20))
        assert (large.status_code, large.json()["error"]["code"]) == (413, "too_large")
        pieces = client.post(PATH, content=(bytes(1 << 18) for _ in range(8)))  # without a length told before
        assert pieces.status_code == 413
        assert client.post(PATH, json=CHAT).status_code == 200


def test_too_many_images(http: httpx.Client) -> None:
    part = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    answer = http.post(PATH, json={"messages": [{"role": "user", "content": [part] * 11}]})
    assert answer.status_code == 400
    assert "at most 10" in answer.json()["error"]["message"]


def test_too_many_at_once(server: TritonServer) -> None:
    long = {**CHAT, "max_tokens": 3000, "ignore_eos": True, "stream": True}
    with serve(create_app(server.grpc_url, configured(max_requests=2))) as url, httpx.Client(base_url=url) as client:
        with client.stream("POST", PATH, json=long), client.stream("POST", PATH, json=long):
            third = client.post(PATH, json=CHAT)
            assert (third.status_code, third.headers["retry-after"]) == (429, "1")
            assert client.get("/health").status_code == 200
        end = time.monotonic() + 5
        while (status := client.post(PATH, json=CHAT).status_code) == 429 and time.monotonic() < end:
            time.sleep(0.05)
        assert status == 200


def test_a_server_that_is_gone() -> None:
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


def test_faults_of_the_server() -> None:
    for fault, status in {
        ServerUnavailable("the queue is full"): 503, ServerError("broken"): 502, Cancelled("stopped"): 503,
        KeyError("secret"): 500, ApiError(418, "tea"): 418,
    }.items():  # fmt: skip
        error = from_fault(fault, {})
        assert error.status == status
        assert "secret" not in error.message
        assert ("retry-after" in error.response().headers) == (status == 503)
