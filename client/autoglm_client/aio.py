"""The asyncio client."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any

import grpc

from autoglm_client import wire
from autoglm_client.base import READY_REQUEST, BaseClient
from autoglm_client.errors import AutoGLMError, Cancelled, MalformedResponse, RequestTimeout, from_status
from autoglm_client.media import AudioSource, ImageSource
from autoglm_client.open_call import STOP_SECONDS, OpenCall
from autoglm_client.result import Piece, ResponseCollector, Result
from autoglm_client.wire import Messages, SamplingValue


class AsyncStream(AsyncIterator[Piece]):
    """A streamed answer: an async iterator of its pieces, followed by `await result()`.

    Closing the stream before its end (`cancel()`, leaving its `async with` block, cancellation of the reading task,
    garbage collection) stops the request on the server.
    """

    def __init__(
        self,
        call: OpenCall,
        leave: Callable[..., None],
        *,
        request_id: str,
        server: str,
        first_piece_timeout: float | None,
    ) -> None:
        self.request_id = request_id
        self._call = call
        self._leave = leave
        self._server = server
        self._loop = asyncio.get_running_loop()
        self._collector = ResponseCollector(request_id)
        self._error: AutoGLMError | None = None
        self._result: Result | None = None
        self._first_piece_timeout = first_piece_timeout
        self._first_piece_by = None if first_piece_timeout is None else self._loop.time() + first_piece_timeout

    @property
    def text(self) -> str:
        """The text received so far."""
        return self._collector.text

    async def __anext__(self) -> Piece:
        while True:
            if self._error:
                raise self._error
            if self._result:
                raise StopAsyncIteration
            piece = await self._advance()
            if piece:
                return piece

    async def result(self) -> Result:
        """Wait for the end of the stream and return the complete answer. Raises AutoGLMError."""
        async for _ in self:
            pass
        assert self._result is not None
        return self._result

    def cancel(self) -> None:
        """Stop the request on the server; further iteration raises Cancelled. No-op after the end of the stream."""
        self._interrupt(Cancelled("the request was cancelled"))

    async def aclose(self) -> None:
        """An alias of `cancel`."""
        self.cancel()

    async def __aenter__(self) -> "AsyncStream":
        return self

    async def __aexit__(self, *_: object) -> None:
        self.cancel()

    def __del__(self) -> None:
        if hasattr(self, "_first_piece_by") and not (self._error or self._result) and self._loop.is_running():
            with contextlib.suppress(RuntimeError):  # the loop has been closed meanwhile
                self._loop.call_soon_threadsafe(self._leave, self._call)

    async def _advance(self) -> Piece | None:
        """Receive the next response, or the end of the stream."""
        try:
            message = await asyncio.wait_for(self._call.read(), self._first_piece_left())
            if message is None:
                self._result = self._collector.result()
                return None
            piece = self._collector.add(wire.read_response(message))
        except asyncio.CancelledError:
            if self._error:  # the call was cancelled, not the reading task
                raise self._error from None
            self.cancel()
            raise
        except (TimeoutError, asyncio.TimeoutError):
            limit = f"first_piece_timeout of {self._first_piece_timeout:g} s"
            self._interrupt(RequestTimeout(f"{limit} expired before the first piece arrived"))
            return None
        except grpc.RpcError as fault:
            error = from_status(fault.code(), fault.details(), self._server)
            if isinstance(error, RequestTimeout):
                self._interrupt(error)
            raise self._ended(error) from None
        except MalformedResponse as malformed:
            self._interrupt(malformed)
            raise
        except AutoGLMError as failure:
            raise self._ended(failure) from None
        if piece:
            self._first_piece_by = None
        return piece

    def _first_piece_left(self) -> float | None:
        return None if self._first_piece_by is None else max(0.0, self._first_piece_by - self._loop.time())

    def _ended(self, error: AutoGLMError) -> AutoGLMError:
        """Record that the server ended the stream with `error`, and return the first error of the stream."""
        self._error = self._error or error
        return self._error

    def _interrupt(self, error: AutoGLMError) -> None:
        """End the stream with `error`, unless it has ended, and stop the request on the server."""
        if self._error or self._result:
            return
        self._error = error
        self._leave(self._call)


class AsyncClient(BaseClient[AsyncStream]):
    """A client for one event loop. `BaseClient` documents the arguments."""

    _open_channel = staticmethod(grpc.aio.insecure_channel)

    async def generate(
        self,
        *,
        messages: Messages | None = None,
        prompt: str | None = None,
        images: Iterable[ImageSource] = (),
        audio: Iterable[AudioSource] = (),
        timeout: float | None = None,
        request_id: str | None = None,
        **options: SamplingValue,
    ) -> Result:
        """Send a request and wait for the complete answer. The arguments are those of `Client.generate`."""
        async with self._send(
            options, timeout, None, messages=messages, prompt=prompt, images=images, audio=audio, request_id=request_id
        ) as stream:
            return await stream.result()

    async def is_ready(self) -> bool:
        """Whether the server is reachable and reports the ensemble as ready."""
        try:
            return bool((await self._stub.ModelReady(READY_REQUEST, timeout=self._connect_timeout)).ready)
        except grpc.RpcError:
            return False

    async def aclose(self) -> None:
        """Cancel running requests and close the connection."""
        if self._closed:
            return
        self._closed = True
        for stream in list(self._streams):
            stream.cancel()
        if self._stopping:
            await asyncio.wait(self._stopping, timeout=STOP_SECONDS)
        await self._channel.close()

    async def __aenter__(self) -> "AsyncClient":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def _open_stream(self, request: Any, timeout: float, first_piece_timeout: float | None) -> AsyncStream:
        call = OpenCall(self._stub, request, timeout)
        return AsyncStream(
            call, self._leave, request_id=request.id, server=self.server, first_piece_timeout=first_piece_timeout
        )

    def _leave(self, call: OpenCall) -> None:
        """Stop a request in a task, which `aclose` waits for."""
        task = asyncio.get_running_loop().create_task(call.end())
        self._stopping.add(task)
        task.add_done_callback(self._stopping.discard)
