"""The blocking client against a fake Triton server."""

import gc
import json
import math
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from autoglm_client import (
    Alternative,
    AutoGLMError,
    Cancelled,
    Client,
    InvalidRequest,
    Point,
    RequestTimeout,
    ServerError,
    ServerUnavailable,
    Tap,
    TokenLogprob,
    Usage,
)
from PIL import Image

from tests.client.fake_server import ANSWER, FakeServer, inputs


def test_streams_pieces_and_then_the_result(fake: FakeServer) -> None:
    with Client(fake.url) as client, client.stream(prompt="打开设置") as stream:
        pieces = list(stream)
        result = stream.result()
    assert [piece.text for piece in pieces] == ANSWER
    assert pieces[1].token_ids == (1, 1)
    assert result.text == "".join(ANSWER)
    assert result.token_ids == (0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5)
    assert (result.thought, result.action, result.action_error) == ("点设置", Tap(Point(517, 233)), None)
    assert result.finish_reason == "stop"
    assert result.usage == Usage(
        prompt_tokens=40, image_tokens=32, completion_tokens=12, cached_tokens=8, decode_ms=1.5
    )
    assert 0 < result.first_piece_seconds <= result.total_seconds
    assert not fake.stopped[result.request_id].is_set()  # nothing to stop


def test_each_piece_has_its_log_probabilities(fake: FakeServer) -> None:
    do = TokenLogprob("do", b"do", -0.25, (Alternative("\\xe7", b"\xe7", -0.125),))
    end = TokenLogprob("<|end|>", None, -9999.0, ())
    with Client(fake.url) as client:
        with client.stream(prompt="打开设置", logprobs=1) as stream:
            pieces = list(stream)
            result = stream.result()
        assert [piece.logprobs for piece in pieces] == [(do, end)] * 6
        assert result.logprobs == (do, end) * 6
        assert client.generate(prompt="打开设置").logprobs == ()


def test_generate_requests_a_single_response(fake: FakeServer) -> None:
    with Client(fake.url) as client:
        result = client.generate(prompt="打开设置", request_id="mine")
    assert (result.text, result.request_id) == ("".join(ANSWER), "mine")
    assert not fake.requests[0].parameters["stream"].bool_param


def test_encodes_all_kinds_of_arguments(fake: FakeServer, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"file a")
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "打开"}]}]
    picture = Image.new("RGB", (2, 2))
    with Client(fake.url) as client:
        client.generate(
            messages=chat,
            images=[
                tmp_path / "a.png",
                str(tmp_path / "a.png"),
                b"b",
                bytearray(b"c"),
                "data:image/png;base64,QQ==",
                picture,
            ],
            timeout=2.5,
            max_tokens=5,
            temperature=0.5,
            top_p=1,
            ignore_eos=True,
            stop=["。", "x"],
            stop_token_ids=[1, 2],
            seed=None,
            priority=3,
            response_format={"type": "phone_action"},
            logprobs=0,
        )
    request = fake.requests[0]
    sent = inputs(request)
    assert json.loads(sent["MESSAGES"][0]) == chat
    assert sent["IMAGES"][:5] == [b"file a", b"file a", b"b", b"c", b"data:image/png;base64,QQ=="]
    assert sent["IMAGES"][5].startswith(b"\x89PNG")
    assert set(sent) == {"MESSAGES", "IMAGES"}
    values = {name: getattr(p, p.WhichOneof("parameter_choice")) for name, p in request.parameters.items()}
    assert values == {
        "stream": False,
        "timeout": 2_500_000,
        "max_tokens": 5,
        "temperature": 0.5,
        "top_p": 1,
        "ignore_eos": True,
        "stop": '["。", "x"]',
        "stop_token_ids": "[1, 2]",
        "response_format": '{"type": "phone_action"}',
        "logprobs": 0,
        "request_priority": 3,  # Triton does not pass `priority` on to the models
    }


def test_rejects_what_cannot_be_encoded(fake: FakeServer) -> None:
    with Client(fake.url) as client:
        for wrong in ({}, {"prompt": "a", "messages": []}, {"messages": [{"content": object()}]}):
            with pytest.raises(InvalidRequest, match="messages"):
                client.generate(**wrong)  # type: ignore[arg-type]
        values = {"seed": 2**70, "sequence_id": 1, "triton_x": 1, "max_tokens": object(), "response_format": {"a": {1}}}
        for name, value in values.items():
            with pytest.raises(InvalidRequest, match=name):
                client.generate(prompt="a", **{name: value})  # type: ignore[arg-type]
        with pytest.raises(FileNotFoundError):
            client.generate(prompt="a", images=["nowhere.png"])
        with pytest.raises(TypeError, match=r"^images must contain bytes, paths, data URLs or PIL images \(got int\)$"):
            client.generate(prompt="a", images=[3])  # type: ignore[list-item]
        client.generate(prompt="a", temperature=math.nan)  # validated by the server
    assert len(fake.requests) == 1


DECORATED = "in ensemble 'ensemble', [request id: 7f] "
FAULTS = [
    (
        f"error:{DECORATED}INVALID_ARGUMENT: max_tokens must be between 1 and 2147483647 (got -1)",
        InvalidRequest,
        r"^max_tokens must be between 1 and 2147483647 \(got -1\)$",
    ),
    (f"error:{DECORATED}UNAVAILABLE: the queue is full", ServerUnavailable, "^the queue is full$"),
    ("error:RESOURCE_EXHAUSTED: full", ServerUnavailable, "^full$"),
    ("error:DEADLINE_EXCEEDED: too late", RequestTimeout, "^too late$"),
    ("error:CANCELLED: before it was read", Cancelled, "^before it was read$"),
    ("error:INTERNAL: internal error (KeyError)", ServerError, "^internal error"),
    (
        f"error:{DECORATED}Failed to process the request(s) for model 'preprocess_0_0', message: "
        "ValueError: boom\n\nAt:\n  /srv/model.py(10): execute\n",
        ServerError,
        "^ValueError: boom$",
    ),
    ("error:Stub process 'autoglm_llm_0_0' is not healthy.", ServerError, "^Stub process"),
    ("error:Request for unknown model: 'ensemble' is not found", ServerUnavailable, "unknown model"),
    ("error:[request id: s5] Exceeds maximum queue size", ServerUnavailable, "^Exceeds maximum queue size$"),
    ("abort:UNAVAILABLE:Socket closed", ServerUnavailable, r"^the connection to 127.0.0.1:\d+ was lost$"),
    ("abort:UNKNOWN:what", ServerError, "^what$"),
    ("finish:cancelled", Cancelled, "^the request was cancelled on the server$"),
    ("finish:timeout", RequestTimeout, "^the answer was not complete within the request's timeout$"),
    ("finish:", ServerError, "without a finish reason"),
    ("unreadable", ServerError, "^the server sent a response that cannot be decoded$"),
    ("unreadable:{", ServerError, r"^LOGPROBS must be a list of tokens \(got '{'\)$"),
    ('unreadable:[{"token": "a"}]', ServerError, "^LOGPROBS must be a list of tokens"),
    ("unreadable:[1]", ServerError, "^LOGPROBS must be a list of tokens"),
]


@pytest.mark.parametrize(("prompt", "kind", "message"), FAULTS, ids=[prompt[:30] for prompt, _, _ in FAULTS])
def test_failures_raise_their_exceptions(fake: FakeServer, prompt: str, kind: type[AutoGLMError], message: str) -> None:
    with Client(fake.url) as client:
        with client.stream(prompt=prompt) as stream:
            for _ in range(2):  # the error is raised again
                with pytest.raises(kind, match=message):
                    stream.result()
        assert client.generate(prompt="still there").finish_reason == "stop"


def test_a_refused_connection_fails_immediately() -> None:
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))  # bound, but not listening
        server = f"127.0.0.1:{reserved.getsockname()[1]}"
        with Client(server) as client:
            assert not client.is_ready()
            with pytest.raises(ServerUnavailable, match=rf"^no server at {server} \(Connection refused\)$"):
                client.generate(prompt="a")


def test_connect_timeout_limits_the_handshake() -> None:
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        with (
            Client(f"127.0.0.1:{mute.getsockname()[1]}", connect_timeout=0.2, timeout=30) as client,
            pytest.raises(ServerUnavailable, match=r"^no server at .* \(no response\)$"),
        ):
            client.generate(prompt="a")


def test_is_ready(fake: FakeServer) -> None:
    with Client(fake.url) as client:
        assert client.is_ready()


def test_first_piece_timeout(fake: FakeServer) -> None:
    with Client(fake.url) as client, client.stream(prompt="silent", first_piece_timeout=0.1) as stream:
        with pytest.raises(
            RequestTimeout, match=r"^first_piece_timeout of 0\.1 s expired before the first piece arrived$"
        ):
            next(stream)
        assert fake.was_stopped(stream.request_id)


def test_first_piece_timeout_does_not_limit_later_pieces(fake: FakeServer) -> None:
    with Client(fake.url) as client, client.stream(prompt="endless", first_piece_timeout=0.2) as stream:
        assert [next(stream).text for _ in range(20)] == ["字"] * 20  # 0.4 seconds


def test_total_timeout(fake: FakeServer) -> None:
    with Client(fake.url) as client, client.stream(prompt="endless", timeout=0.2) as stream:
        with pytest.raises(RequestTimeout, match="the answer was not complete"):
            stream.result()
        assert "字" in stream.text
        assert fake.was_stopped(stream.request_id)
    with Client(fake.url, timeout=0.2) as client, pytest.raises(RequestTimeout):
        client.generate(prompt="silent", request_id="g")
    assert fake.was_stopped("g")


def test_cancel_from_another_thread(fake: FakeServer) -> None:
    with Client(fake.url) as client:
        stream = client.stream(prompt="endless")
        next(stream)
        threading.Timer(0.1, stream.cancel).start()
        with pytest.raises(Cancelled):
            stream.result()
        assert fake.was_stopped(stream.request_id)
        stream.cancel()  # a no-op


def test_cancel_before_the_first_piece(fake: FakeServer) -> None:
    with Client(fake.url) as client:
        stream = client.stream(prompt="silent")
        threading.Timer(0.1, stream.cancel).start()
        with pytest.raises(Cancelled):
            next(stream)
        assert fake.was_stopped(stream.request_id)


def test_the_call_is_cancelled_if_stop_requests_fail(fake: FakeServer) -> None:
    """Such as those for a request that has not reached the language model yet."""
    with Client(fake.url) as client:
        stream = client.stream(prompt="deaf", request_id="early")
        while not fake.requests:
            time.sleep(0.01)
        stream.cancel()
        assert fake.was_cancelled("early")


def test_abandoned_streams_stop_their_requests(fake: FakeServer) -> None:
    with Client(fake.url) as client:
        with client.stream(prompt="endless", request_id="block") as stream:
            next(stream)
        assert fake.was_stopped("block")

        for _ in client.stream(prompt="endless", request_id="loop"):
            break
        gc.collect()
        assert fake.was_stopped("loop")

        running = client.stream(prompt="endless", request_id="closed")
        next(running)
    assert fake.was_stopped("closed")
    with pytest.raises(Cancelled):
        next(running)
    with pytest.raises(Cancelled, match="closed"):
        client.generate(prompt="a")


def test_one_client_has_many_concurrent_streams(fake: FakeServer) -> None:
    with Client(fake.url) as client:
        endless = [client.stream(prompt="endless") for _ in range(8)]
        for stream in endless:
            next(stream)
        with ThreadPoolExecutor(16) as pool:
            results = list(pool.map(lambda n: client.stream(prompt="a", request_id=f"r{n}").result(), range(64)))
        assert [r.request_id for r in results] == [f"r{n}" for n in range(64)]
        assert {r.text for r in results} == {"".join(ANSWER)}
        endless[0].cancel()
        for stream in endless[1:]:
            assert next(stream).text == "字"  # the other streams continue


def test_reconnects_to_a_restarted_server(fake: FakeServer) -> None:
    with Client(fake.url) as client:
        assert client.generate(prompt="a").text
        fake.__exit__(None, None, None)
        with pytest.raises(ServerUnavailable):
            client.generate(prompt="a")
        with FakeServer(fake.url):
            deadline = time.monotonic() + 10
            while not client.is_ready():
                assert time.monotonic() < deadline
                time.sleep(0.05)
            assert client.generate(prompt="a").text
