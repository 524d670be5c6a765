"""Middleware of the API's routes: API keys, limits, request ids and cancellation when the caller disconnects."""

import asyncio
import re
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from autoglm.config import GatewayConfig
from gateway.auth import ApiKeys
from gateway.errors import ApiError
from gateway.metrics import GatewayMetrics

REQUEST_ID = b"x-request-id"
BODY_SECONDS = 60.0  # for receiving a whole body

_ID = re.compile(rb"[\w.:-]{1,128}", re.ASCII)


class _DisconnectedError(Exception):
    """The caller disconnected before the request was complete."""


class RequestMiddleware:
    """ASGI middleware for /v1/ and /tokenize; other paths are passed on unchanged."""

    def __init__(self, app: ASGIApp, keys: ApiKeys, config: GatewayConfig, metrics: GatewayMetrics) -> None:
        self.app = app
        self._keys = keys
        self._max_body = config.max_body_mb << 20
        self._max_requests = config.max_requests
        self._metrics = metrics
        self._running = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith(("/v1/", "/tokenize")):
            await self.app(scope, receive, send)
            return
        headers: dict[bytes, bytes] = dict(scope["headers"])
        given = headers.get(REQUEST_ID, b"")
        request_id = given if _ID.fullmatch(given) else uuid.uuid4().hex.encode()
        scope.setdefault("state", {})["request_id"] = request_id.decode()
        response = _Response(send, request_id)
        begun = time.monotonic()
        try:
            self._keys.check(headers.get(b"authorization"))
            with self._running_request():
                body = await self._read(receive, headers)
                await self._run(scope, body, receive, response)
        except _DisconnectedError:
            self._metrics.disconnects.inc()
        except ApiError as error:
            await error.response()(scope, receive, response.send)
        finally:
            self._metrics.finished(scope["path"], response.status, time.monotonic() - begun)

    @contextmanager
    def _running_request(self) -> Iterator[None]:
        if self._running >= self._max_requests:
            raise ApiError(429, f"too many requests: at most {self._max_requests} are answered at a time", "busy")
        self._running += 1
        self._metrics.running.set(self._running)
        try:
            yield
        finally:
            self._running -= 1
            self._metrics.running.set(self._running)

    async def _read(self, receive: Receive, headers: dict[bytes, bytes]) -> bytes:
        """The whole body. Raises ApiError if it is too large or arrives too slowly."""
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self._max_body:
            raise self._too_large(f"{int(length)}")
        try:
            return await asyncio.wait_for(self._collect(receive), BODY_SECONDS)
        except (TimeoutError, asyncio.TimeoutError):
            raise ApiError(408, f"the body did not arrive within {BODY_SECONDS:g} s", "timeout") from None

    async def _collect(self, receive: Receive) -> bytes:
        chunks: list[bytes] = []
        size, more = 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise _DisconnectedError
            chunks.append(message.get("body", b""))
            size += len(chunks[-1])
            if size > self._max_body:
                raise self._too_large(f"{size} or more")
            more = message.get("more_body", False)
        return b"".join(chunks)

    def _too_large(self, got: str) -> ApiError:
        return ApiError(413, f"the body must be at most {self._max_body} bytes (got {got})", "too_large")

    async def _run(self, scope: Scope, body: bytes, receive: Receive, response: "_Response") -> None:
        work = asyncio.ensure_future(self.app(scope, _replay(body), response.send))
        disconnect = asyncio.ensure_future(_wait_for_disconnect(receive))
        try:
            await asyncio.wait([work, disconnect], return_when=asyncio.FIRST_COMPLETED)
            if not work.done() and not response.complete:
                self._metrics.disconnects.inc()
                work.cancel()
            await asyncio.wait([work])
        finally:
            disconnect.cancel()
            work.cancel()
        if not work.cancelled():
            work.result()


class _Response:
    """Forwards a response with the request's id in its headers, and records its status and whether it is complete."""

    def __init__(self, send: Send, request_id: bytes) -> None:
        self._send = send
        self._request_id = request_id
        self.status = 0
        self.complete = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message["headers"] = [*message.get("headers", ()), (REQUEST_ID, self._request_id)]
        elif not message.get("more_body", False):
            self.complete = True
        await self._send(message)


def _replay(body: bytes) -> Receive:
    """An ASGI receive channel with a body that was already read. Later receive() calls block."""
    rest: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Message:
        if not rest:
            await asyncio.Event().wait()
        return rest.pop()

    return receive


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
