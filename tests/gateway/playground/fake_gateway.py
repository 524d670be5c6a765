"""An HTTP server that serves the playground and answers requests in the gateway's format from a script."""

import json
import queue
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

from gateway.playground import HEADERS, STATIC
from gateway.responses import CompletionUsage

USAGE = CompletionUsage(
    prompt_tokens=3391,
    completion_tokens=20,
    cached_tokens=3072,
    timings={"queue_ms": 2.1, "preprocess_ms": 9.0, "vision_ms": 38.4, "prefill_ms": 21.2, "decode_ms": 95.7},
).to_dict()


@dataclass
class ScriptedAnswer:
    """One answer: a stream of `text` with `usage`, or an error.

    The stream stops before `text[pause]` until `resume` is set. `broken`: the connection ends without [DONE].
    `error` is sent as the body when `status` is not 200, else as an event of the stream.
    """

    text: str = ""
    usage: Mapping[str, Any] | None = field(default_factory=lambda: USAGE)
    transcripts: Sequence[str] = ()
    finish_reason: str = "stop"
    pause: int | None = None
    broken: bool = False
    status: int = 200
    error: Mapping[str, Any] | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    resume: threading.Event = field(default_factory=threading.Event)
    disconnected: threading.Event = field(default_factory=threading.Event)  # the client closed the connection

    def __post_init__(self) -> None:
        if self.pause is None:
            self.resume.set()


@dataclass(frozen=True)
class RecordedRequest:
    """A request that was received."""

    body: dict[str, Any]
    key: str | None


class FakeGateway:
    """Serves on 127.0.0.1, on a free port, inside its `with` block. `key` is required unless it is None."""

    def __init__(self) -> None:
        self.key: str | None = None
        self.answers: queue.Queue[ScriptedAnswer] = queue.Queue()
        self.requests: list[RecordedRequest] = []
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, self))
        self.url = f"http://127.0.0.1:{self._http.server_port}/"
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.05})

    def will_answer(self, answer: ScriptedAnswer | str) -> ScriptedAnswer:
        """Script the answer to the next request."""
        answer = ScriptedAnswer(answer) if isinstance(answer, str) else answer
        self.answers.put(answer)
        return answer

    def __enter__(self) -> "FakeGateway":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()


class _Handler(SimpleHTTPRequestHandler):
    def __init__(self, owner: FakeGateway, *args: Any) -> None:
        self.owner = owner
        super().__init__(*args, directory=str(STATIC))

    def end_headers(self) -> None:
        for name, value in HEADERS.items():
            self.send_header(name, value)
        super().end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        if self.path != "/v1/models":
            super().do_GET()
        elif self._has_valid_key():
            self._json(200, {"object": "list", "data": [{"id": "autoglm-phone-9b", "object": "model"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert self.path == "/v1/chat/completions"
        if not self._has_valid_key():
            return
        self.owner.requests.append(RecordedRequest(body, self.headers["Authorization"]))
        answer = self.owner.answers.get(timeout=10)
        if answer.status != 200:
            self._json(answer.status, {"error": answer.error}, answer.headers)
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        try:
            self._stream(answer)
        except OSError:
            answer.disconnected.set()

    def _stream(self, answer: ScriptedAnswer) -> None:
        first = {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]}
        self._event(first | ({"transcripts": answer.transcripts} if answer.transcripts else {}))
        at = 0
        while at < len(answer.text):
            if answer.pause is not None and at >= answer.pause:
                while not answer.resume.wait(0.05):
                    self.wfile.write(b": keep-alive\n\n")
            piece = answer.text[at : at + 3]
            at += len(piece)
            self._event({"choices": [{"index": 0, "delta": {"content": piece}, "finish_reason": None}]})
        if answer.error:
            self._event({"error": answer.error})
        elif not answer.broken:
            self._event({"choices": [{"index": 0, "delta": {}, "finish_reason": answer.finish_reason}]})
            if answer.usage is not None:
                self._event({"choices": [], "usage": answer.usage})
            self.wfile.write(b"data: [DONE]\n\n")

    def _event(self, chunk: Mapping[str, Any]) -> None:
        common = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "autoglm-phone-9b"}
        event = f"data: {json.dumps({**common, **chunk}, ensure_ascii=False)}\n\n".encode()
        middle = len(event) // 2  # chunks do not end at the ends of events or characters
        for part in (event[:middle], event[middle:]):
            self.wfile.write(part)
            self.wfile.flush()

    def _has_valid_key(self) -> bool:
        valid = self.owner.key is None or self.headers["Authorization"] == f"Bearer {self.owner.key}"
        if not valid:
            message = "Authorization: invalid API key; send 'Authorization: Bearer <key>'"
            self._json(401, {"error": {"message": message, "type": "invalid_request_error"}})
        return valid

    def _json(self, status: int, body: Any, headers: Mapping[str, str] | None = None) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)
