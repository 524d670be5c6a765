"""The blocking client."""

from __future__ import annotations

import contextlib
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Any

import grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc

from autoglm_client import wire
from autoglm_client.errors import AutoGLMError, Cancelled, RequestTimeout, Unreadable, from_status
from autoglm_client.images import ImageSource
from autoglm_client.open_call import STOP_EVERY, STOP_SECONDS
from autoglm_client.result import Piece, Result, Transcript
from autoglm_client.sounds import AudioSource
from autoglm_client.wire import Messages, SamplingValue

GRACE_SECONDS = 1.0  # the server ends a request whose time is over: only if it does not, the call does


class Stream(Iterator[Piece]):
    """An answer on its way: iterate for its pieces, then ask for the `result()`.

    One thread iterates; `cancel()` may come from any thread. A stream that is left before its end (`close()`, the end
    of its `with` block, garbage collection) is cancelled on the server too.
    """

    def __init__(
        self, call: Any, request_id: str, first_piece_timeout: float | None, leave: Callable[..., None], server: str
    ) -> None:
        self.request_id = request_id
        self._call = call
        self._reading = threading.Lock()  # held by who reads from the call
        self._leave = leave
        self._server = server
        self._transcript = Transcript(request_id)
        self._lock = threading.Lock()
        self._error: AutoGLMError | None = None
        self._result: Result | None = None
        self._timer: threading.Timer | None = None
        if first_piece_timeout is not None:
            # Weak: the timer must not keep an abandoned stream alive.
            self._timer = threading.Timer(first_piece_timeout, _expire, (weakref.ref(self), first_piece_timeout))
            self._timer.daemon = True
            self._timer.start()

    @property
    def text(self) -> str:
        """Everything that has come so far."""
        return self._transcript.text

    def __next__(self) -> Piece:
        while True:
            if self._error:
                raise self._error
            if self._result:
                raise StopIteration
            piece = self._advance()
            if piece:
                return piece

    def result(self) -> Result:
        """The complete answer, after waiting for what is still missing of it."""
        for _ in self:
            pass
        assert self._result is not None
        return self._result

    def cancel(self) -> None:
        """Stop the generation, here and on the server. Iterating on raises Cancelled. No-op when it has ended."""
        self.interrupt(Cancelled("the request was cancelled"))

    def close(self) -> None:
        """The same as cancel(); what one calls when done with a stream."""
        self.cancel()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_timer"):  # else the constructor failed
            with contextlib.suppress(Exception):
                self.close()

    def _advance(self) -> Piece | None:
        """Take the next response, or the end, from the network."""
        try:
            with self._reading:
                message = next(self._call)
            piece = self._transcript.add(wire.read_response(message))
        except StopIteration:
            self._end()
            return None
        except grpc.RpcError as error:
            raise self._failed(error) from None
        except Unreadable as error:
            self.interrupt(error)
            raise
        except AutoGLMError as error:
            raise self._ended(error) from None
        if piece:
            self._stop_timer()
        return piece

    def _end(self) -> None:
        try:
            result = self._transcript.result()
        except AutoGLMError as error:
            self._ended(error)
            return
        self._stop_timer()
        with self._lock:
            if not self._error:
                self._result = result

    def _failed(self, fault: grpc.RpcError) -> AutoGLMError:
        if fault.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
            self.interrupt(RequestTimeout("no end of the answer within the time allowed"))
        return self._ended(from_status(fault.code(), fault.details(), self._server))

    def _ended(self, error: AutoGLMError) -> AutoGLMError:
        """Record that the server ended the stream with `error`; the error that counts is the first."""
        self._stop_timer()
        with self._lock:
            self._error = self._error or error
            return self._error

    def _stop_timer(self) -> None:
        if self._timer:
            self._timer.cancel()

    def interrupt(self, error: AutoGLMError) -> None:
        """End the stream with `error`, unless it has ended, and see to it that the server ends it too."""
        with self._lock:
            if self._error or self._result:
                return
            self._error = error
        self._stop_timer()
        self._leave(self._call, self._reading, self.request_id)


class Client:
    """A connection to the server; carries any number of requests at once, from any thread.

    Times are in seconds: `connect_timeout` bounds the making of the connection, `first_piece_timeout` the wait for the
    first piece of a streamed answer, `timeout` the whole request; the last two can be given for each request.
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
        self._channel = grpc.insecure_channel(server, options=wire.channel_options(connect_timeout))
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)
        self._streams: weakref.WeakSet[Stream] = weakref.WeakSet()
        self._stopping: set[threading.Thread] = set()
        self._closed = False

    def generate(
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
        """Ask and wait for the complete answer, which the server sends in one piece.

        `messages` (an OpenAI-style chat) or `prompt` (a user's turn, which may be empty beside `audio`); `images` and
        `audio` in the order of their placeholders; `sampling`: audio_mode, max_tokens, temperature, top_p, ..., lists
        for `stop` and `stop_token_ids`, `response_format={"type": "phone_action"}` for an answer that always is an
        action, `logprobs=3` for the log probability of each token beside three alternatives. Raises AutoGLMError.
        """
        limit = self._timeout if timeout is None else timeout
        request = wire.inference_request(
            messages, prompt, images, audio, sampling, request_id, stream=False, timeout=limit
        )
        with self._open(request, limit, None) as stream:
            return stream.result()

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
    ) -> Stream:
        """Ask and get the answer while it is made; the arguments are those of `generate`."""
        limit = self._timeout if timeout is None else timeout
        first = self._first_piece_timeout if first_piece_timeout is None else first_piece_timeout
        request = wire.inference_request(
            messages, prompt, images, audio, sampling, request_id, stream=True, timeout=limit
        )
        return self._open(request, limit, first)

    def is_ready(self) -> bool:
        """Whether a server is there and says that the ensemble can be asked."""
        request = service_pb2.ModelReadyRequest(name=wire.ENSEMBLE)
        try:
            return bool(self._stub.ModelReady(request, timeout=self._connect_timeout).ready)
        except grpc.RpcError:
            return False

    def close(self) -> None:
        """Cancel what is still running and close the connection."""
        if self._closed:
            return
        self._closed = True
        for stream in list(self._streams):
            stream.close()
        for thread in list(self._stopping):
            thread.join(STOP_SECONDS)
        self._channel.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open(self, request: Any, timeout: float, first_piece_timeout: float | None) -> Stream:
        if self._closed:
            raise Cancelled("the client is closed")
        call = self._stub.ModelStreamInfer(iter([request]), timeout=timeout + GRACE_SECONDS)
        stream = Stream(call, request.id, first_piece_timeout, self._leave, self.server)
        self._streams.add(stream)
        return stream

    def _leave(self, call: Any, reading: threading.Lock, request_id: str) -> None:
        """See to it that a request ends for which nobody waits any more; `close` waits for that."""
        thread = threading.Thread(target=self._end, args=(call, reading, request_id), daemon=True)
        self._stopping.add(thread)
        thread.start()

    def _end(self, call: Any, reading: threading.Lock, request_id: str) -> None:
        """Tell the server to stop until it has, with the call kept open meanwhile: `OpenCall` says why."""
        last = threading.Timer(STOP_SECONDS, call.cancel)
        last.daemon = True
        last.start()
        try:
            while not self._send_stop(request_id) and call.is_active():
                time.sleep(STOP_EVERY)
            with reading, contextlib.suppress(grpc.RpcError):
                for _ in call:
                    pass
        finally:
            last.cancel()
            self._stopping.discard(threading.current_thread())

    def _send_stop(self, request_id: str) -> bool:
        """Whether the request was there to be stopped."""
        request = iter([wire.stop_request(request_id)])
        with contextlib.suppress(grpc.RpcError, ValueError):  # the server, or our own connection, is gone
            return not any(
                message.error_message for message in self._stub.ModelStreamInfer(request, timeout=STOP_SECONDS)
            )
        return False


def _expire(reference: weakref.ref[Stream], seconds: float) -> None:
    stream = reference()
    if stream:
        stream.interrupt(RequestTimeout(f"no piece of the answer within {seconds:g} s"))
