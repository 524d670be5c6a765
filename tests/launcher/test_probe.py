import base64
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from autoglm_launcher import probe
from autoglm_launcher.probe import ProbeError, Sample, ask, count_responses

Serve = Callable[[int, bytes], str]
PIECES = [
    {"TEXT": "<think>", "FINISH_REASON": "", "USAGE": ""},
    {"TEXT": "a", "FINISH_REASON": "stop", "USAGE": json.dumps({"completion_tokens": 2})},
]


@pytest.fixture
def sample(tmp_path: Path) -> Sample:
    (tmp_path / "screen.png").write_bytes(b"pixels")
    (tmp_path / "samples.json").write_text('[{"image": "screen.png", "task": "打开设置", "more": 1}]', encoding="utf-8")
    return Sample.first(tmp_path)


@pytest.fixture
def requests() -> list[dict[str, Any]]:
    return []


@pytest.fixture
def serve(requests: list[dict[str, Any]]) -> Iterator[Serve]:
    """Starts a server that answers every request with one status and body; returns its address."""
    servers: list[ThreadingHTTPServer] = []

    def start(status: int, body: bytes) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                requests.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                self.do_GET()

            def do_GET(self) -> None:
                self.send_response(status)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                pass

        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"127.0.0.1:{servers[-1].server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def events(*pieces: dict[str, Any]) -> bytes:
    return b"".join(b"data: " + json.dumps(piece).encode() + b"\n\n" for piece in pieces)


def test_joins_the_pieces(serve: Serve, sample: Sample, requests: list[dict[str, Any]]) -> None:
    answer = ask(serve(200, events(*PIECES)), sample, max_tokens=5, timeout_s=5)
    assert (answer.text, answer.finish_reason, answer.usage) == ("<think>a", "stop", {"completion_tokens": 2})
    assert requests[0]["PROMPT"] == "打开设置"
    assert requests[0]["IMAGES"] == ["data:image/png;base64,cGl4ZWxz"]
    assert requests[0]["max_tokens"] == 5


def test_a_spoken_task_is_sent_as_audio(serve: Serve, requests: list[dict[str, Any]]) -> None:
    spoken = [{**PIECES[0], "TRANSCRIPTS": "tap on Battery"}, PIECES[1]]
    sample = Sample.spoken()
    answer = ask(serve(200, events(*spoken)), sample, max_tokens=5, timeout_s=5)
    assert (answer.text, answer.transcript, sample.task) == ("<think>a", "tap on Battery", "please tap on Battery")
    (clip,) = requests[0]["AUDIO"]
    assert requests[0]["PROMPT"] == "" and len(requests[0]["IMAGES"]) == 1
    assert base64.b64decode(clip.removeprefix("data:audio/flac;base64,")).startswith(b"fLaC")


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (500, b'{"error":"Stub process is not healthy."}', "HTTP 500: .*not healthy"),
        (200, events(PIECES[0], {"error": "engine failed"}), "engine failed"),
        (200, events(PIECES[0]), "without a finish reason"),
        (200, events({**PIECES[1], "USAGE": '{"completion_tokens": 0}'}), "or a token"),
        (200, b"", "without a finish reason"),
    ],
)
def test_an_incomplete_answer_is_an_error(serve: Serve, sample: Sample, status: int, body: bytes, message: str) -> None:
    with pytest.raises(ProbeError, match=message) as error:
        ask(serve(status, body), sample, max_tokens=1, timeout_s=5)
    assert not error.value.busy


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (503, b'{"error":"[request id: 5] Exceeds maximum queue size"}'),
        (400, b'data: {"error":"in ensemble \'ensemble\', UNAVAILABLE: 256 requests wait already"}\n\n'),
    ],
)
def test_a_full_queue_is_healthy(serve: Serve, sample: Sample, status: int, body: bytes) -> None:
    with pytest.raises(ProbeError) as error:
        ask(serve(status, body), sample, max_tokens=1, timeout_s=5)
    assert error.value.busy


def test_a_refused_connection_is_an_error(sample: Sample) -> None:
    with pytest.raises(ProbeError, match=r"^no answer from 127\.0\.0\.1:1 \(Connection refused\)$"):
        ask("127.0.0.1:1", sample, max_tokens=1, timeout_s=5)


def test_count_responses_adds_up_all_streams(serve: Serve) -> None:
    statistics = {"model_stats": [{"response_stats": {"0": {"success": {"count": 3}}, "1": {"success": {"count": 2}}}}]}
    assert count_responses(serve(200, json.dumps(statistics).encode())) == 5
    with pytest.raises(ProbeError, match="no statistics"):
        count_responses(serve(404, b"{}"))


def test_missing_samples_are_named(tmp_path: Path) -> None:
    with pytest.raises(ProbeError, match=r"samples\.json is missing or is not a list of samples$"):
        Sample.first(tmp_path)
    (tmp_path / "samples.json").write_text('[{"image": "gone.png", "task": "x"}]')
    with pytest.raises(ProbeError, match=r"gone\.png is missing"):
        Sample.first(tmp_path)


def test_the_exit_code_is_a_health_check(
    serve: Serve, sample: Sample, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(probe, "SAMPLES", sample.image.parent)
    assert probe.main(["--http", serve(200, events(*PIECES))]) == 0
    assert probe.main(["--http", serve(503, b"Exceeds maximum queue size")]) == 0
    assert probe.main(["--http", serve(500, b"broken")]) == 1
    assert "HTTP 500: broken" in capsys.readouterr().err
    well = serve(200, events(*PIECES))
    assert probe.main(["--http", well, "--gateway", serve(200, b"{}")]) == 0
    assert probe.main(["--http", well, "--gateway", serve(503, b'{"error": {"message": "not ready: gone"}}')]) == 1
    assert "gateway: not ready: gone" in capsys.readouterr().err
    assert probe.main(["--http", well, "--gateway", "127.0.0.1:1"]) == 1
