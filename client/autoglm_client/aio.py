"""The asyncio client: the same calls as the blocking one."""

from __future__ import annotations

import asyncio
import contextlib
import weakref
from collections.abc import AsyncIterator, Callable, Iterable
from types import TracebackType
from typing import Any

import grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc

from autoglm_client import wire
from autoglm_client.client import GRACE_SECONDS
from autoglm_client.errors import AutoGLMError, Cancelled, RequestTimeout, Unreadable, from_status
from autoglm_client.images import ImageSource
from autoglm_client.open_call import STOP_SECONDS, OpenCall
from autoglm_client.result import Piece, Result, Transcript
from autoglm_client.sounds import AudioSource
from autoglm_client.wire import Messages, SamplingValue


class AsyncStream(AsyncIterator[Piece]):
    """An answer on its way: `async for` gives its pieces, `await result()` the whole.

    A stream that is left before its end (`cancel()`, the end of its `async with` block, cancellation of the task that
    reads it, garbage collection) is cancelled on the server too.
    """

    def __init__(
        self,
        call: OpenCall,
        request_id: str,
        first_piece_timeout: float | None,
        leave: Callable[[OpenCall], None],
        server: str,
    ) -> None:
        self.request_id = request_id
        self._call = call
        self._leave = leave
        self._server = server
        self._loop = asyncio.get_running_loop()
        self._transcript = Transcript(request_id)
        self._error: AutoGLMError | None = None
        self._result: Result | None = None
        self._first_piece_timeout = first_piece_timeout
        self._first_piece_by = None if first_piece_timeout is None else self._loop.time() + first_piece_timeout

    @property
    def text(self) -> str:
        """Everything that has come so far."""
        return self._transcript.text

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
        """The complete answer, after waiting for what is still missing of it."""
        async for _ in self:
            pass
        assert self._result is not None
        return self._result

    def cancel(self) -> None:
        """Stop the generation, here and on the server. Iterating on raises Cancelled. No-op when it has ended."""
        self._interrupt(Cancelled("the request was cancelled"))

    async def aclose(self) -> None:
        """The same as cancel(); what one calls when done with a stream."""
        self.cancel()

    async def __aenter__(self) -> AsyncStream:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.cancel()

    def __del__(self) -> None:
        if hasattr(self, "_first_piece_by") and not (self._error or self._result) and self._loop.is_running():
            with contextlib.suppress(RuntimeError):  # the loop has just been closed
                self._loop.call_soon_threadsafe(self._leave, self._call)

    async def _advance(self) -> Piece | None:
        """Take the next response, or the end, from the network."""
        try:
            message = await asyncio.wait_for(self._call.read(), self._first_piece_left())
            if message is None:
                self._result = self._transcript.result()
                return None
            piece = self._transcript.add(wire.read_response(message))
        except asyncio.CancelledError:
            if self._error:  # it was the call that was cancelled, not the task which reads it
                raise self._error from None
            self.cancel()
            raise
        except (TimeoutError, asyncio.TimeoutError):
            self._interrupt(RequestTimeout(f"no piece of the answer within {self._first_piece_timeout:g} s"))
            return None
        except grpc.RpcError as fault:
            if fault.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                self._interrupt(RequestTimeout("no end of the answer within the time allowed"))
            raise self._ended(from_status(fault.code(), fault.details(), self._server)) from None
        except Unreadable as error:
            self._interrupt(error)
            raise
        except AutoGLMError as error:
            raise self._ended(error) from None
        if piece:
            self._first_piece_by = None
        return piece

    def _first_piece_left(self) -> float | None:
        return None if self._first_piece_by is None else max(0.0, self._first_piece_by - self._loop.time())

    def _ended(self, error: AutoGLMError) -> AutoGLMError:
        """Record that the server ended the stream with `error`; the error that counts is the first."""
        self._error = self._error or error
        return self._error

    def _interrupt(self, error: AutoGLMError) -> None:
        """End the stream with `error`, unless it has ended, and see to it that the server ends it too."""
        if self._error or self._result:
            return
        self._error = error
        self._leave(self._call)


class AsyncClient:
    """A connection to the server for one event loop; carries any number of requests at once.

    Times are in seconds, as with `Client`.
    """

    def __init__(
        self,
        server: str = "127.0.0.1:8001",
        *,
        connect_timeout: float = 5.0,
        first_piece_timeout: float = 120.0,
        timeout: float = 600.0,
    ) -> None:
        self.server = server
        self._connect_timeout = connect_timeout
        self._first_piece_timeout = first_piece_timeout
        self._timeout = timeout
        self._channel = grpc.aio.insecure_channel(server, options=wire.channel_options(connect_timeout))
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)
        self._streams: weakref.WeakSet[AsyncStream] = weakref.WeakSet()
        self._stopping: set[asyncio.Task[bool]] = set()
        self._closed = False

    async def generate(
        self,
        *,
        messages: Messages | None = None,
        prompt: str | None = None,
        images: Iterable[ImageSource] = (),
        audio: Iterable[AudioSource] = (),
        timeout: float | None = None,
        request_id: str | None = None,
        **sampling: SamplingValue,
    ) -> Result:
        """Ask and wait for the complete answer; the arguments are those of `Client.generate`."""
        limit = self._timeout if timeout is None else timeout
        request = wire.inference_request(
            messages, prompt, images, audio, sampling, request_id, stream=False, timeout=limit
        )
        async with self._open(request, limit, None) as stream:
            return await stream.result()

    def stream(
        self,
        *,
        messages: Messages | None = None,
        prompt: str | None = None,
        images: Iterable[ImageSource] = (),
        audio: Iterable[AudioSource] = (),
        timeout: float | None = None,
        first_piece_timeout: float | None = None,
        request_id: str | None = None,
        **sampling: SamplingValue,
    ) -> AsyncStream:
        """Ask and get the answer while it is made; call it where an event loop runs."""
        limit = self._timeout if timeout is None else timeout
        first = self._first_piece_timeout if first_piece_timeout is None else first_piece_timeout
        request = wire.inference_request(
            messages, prompt, images, audio, sampling, request_id, stream=True, timeout=limit
        )
        return self._open(request, limit, first)

    async def is_ready(self) -> bool:
        """Whether a server is there and says that the ensemble can be asked."""
        request = service_pb2.ModelReadyRequest(name=wire.ENSEMBLE)
        try:
            return bool((await self._stub.ModelReady(request, timeout=self._connect_timeout)).ready)
        except grpc.RpcError:
            return False

    async def aclose(self) -> None:
        """Cancel what is still running and close the connection."""
        if self._closed:
            return
        self._closed = True
        for stream in list(self._streams):
            stream.cancel()
        if self._stopping:
            await asyncio.wait(self._stopping, timeout=STOP_SECONDS)
        await self._channel.close()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    def _open(self, request: Any, timeout: float, first_piece_timeout: float | None) -> AsyncStream:
        if self._closed:
            raise Cancelled("the client is closed")
        call = OpenCall(self._stub, request, timeout + GRACE_SECONDS)
        stream = AsyncStream(call, request.id, first_piece_timeout, self._leave, self.server)
        self._streams.add(stream)
        return stream

    def _leave(self, call: OpenCall) -> None:
        """See to it that a request ends for which nobody waits any more; `aclose` waits for that."""
        task = asyncio.get_running_loop().create_task(call.end())
        self._stopping.add(task)
        task.add_done_callback(self._stopping.discard)
