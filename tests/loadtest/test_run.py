"""`python -m loadtest` against fake Triton servers."""

import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.client.fake_server import FakeServer

ROOT = Path(__file__).parents[2]


class Handler(BaseHTTPRequestHandler):
    """Answers with three events. The second one has a single token, which Triton writes as a scalar."""

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert self.path == "/v2/models/ensemble/generate_stream"
        bad = "bad" in request["MESSAGES"]
        pieces: list[dict[str, object]] = [
            {"TEXT": "a", "TOKEN_IDS": [1, 2], "FINISH_REASON": "", "USAGE": ""},
            {"TEXT": "b", "TOKEN_IDS": 3, "FINISH_REASON": "", "USAGE": ""},
            {"error": "in ensemble 'ensemble', late"}
            if bad
            else {"TEXT": "", "TOKEN_IDS": [], "FINISH_REASON": "stop"},
        ]
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        for piece in pieces:
            self.wfile.write(f"data: {json.dumps(piece)}\n\n".encode())

    def log_message(self, *_: object) -> None:
        """Log nothing."""


@pytest.fixture
def http_server() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def run(directory: Path, grpc_server: str, http_server: str, task: str) -> tuple[int, dict[tuple[str, str], list[int]]]:
    """The exit code, and (requests, failures) by protocol and name."""
    (directory / "a.png").write_bytes(b"png")
    (directory / "samples.json").write_text(json.dumps([{"image": "a.png", "task": task}]), "utf-8")
    command = [sys.executable, "-m", "loadtest", "--users", "2", "--duration", "1", "--samples", str(directory)]
    command += ["--grpc-server", grpc_server, "--http-server", http_server]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    table = done.stdout.partition("percentiles")[0]
    rows = re.findall(r"^(grpc|http) +(\S.*?) +(\d+) +(\d+)\(", table, re.M)
    return done.returncode, {(kind, name): [int(count), int(failed)] for kind, name, count, failed in rows}


def test_the_table_has_the_latencies_of_both_protocols(fake: FakeServer, http_server: str, tmp_path: Path) -> None:
    code, rows = run(tmp_path, fake.url, http_server, "打开")
    assert code == 0
    for protocol, between in (("grpc", 10), ("http", 1)):  # tokens after the first piece
        answers = rows[protocol, "total"][0]
        assert answers > 0
        assert rows[protocol, "time to first token"] == [answers, 0]
        assert rows[protocol, "time between tokens"] == [between * answers, 0]


def test_failures_are_counted_and_fail_the_run(fake: FakeServer, http_server: str, tmp_path: Path) -> None:
    code, rows = run(tmp_path, fake.url, http_server, "error:INTERNAL: bad")
    assert code == 1
    for protocol in ("grpc", "http"):
        count, failed = rows[protocol, "total"]
        assert count == failed > 0
        assert rows[protocol, "time to first token"] == [count, 0]
