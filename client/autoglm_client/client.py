"""The blocking client."""

import contextlib
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import grpc

from autoglm_client import wire
from autoglm_client.base import READY_REQUEST, BaseClient
from autoglm_client.errors import AutoGLMError, Cancelled, MalformedResponse, RequestTimeout, from_status
from autoglm_client.media import AudioSource, ImageSource
from autoglm_client.open_call import STOP_INTERVAL, STOP_SECONDS
from autoglm_client.result import Piece, ResponseCollector, Result
from autoglm_client.wire import Messages, SamplingValue


class Stream(Iterator[Piece]):
    """A streamed answer: an iterator of its pieces, followed by its `result()`.

    One thread iterates; any thread may call `cancel()`. Closing the stream before its end (`close()`, leaving its
    `with` block, garbage collection) stops the request on the server.
    """

    def __init__(
        self, call: Any, leave: Callable[..., None], *, request_id: str, server: str, first_piece_timeout: float | None
    ) -> None:
        self.request_id = request_id
        self._call = call
        self._reading = threading.Lock()  # held while reading from the call
        self._leave = leave
        self._server = server
        self._collector = ResponseCollector(request_id)
        self._lock = threading.Lock()
        self._error: AutoGLMError | None = None
        self._result: Result | None = None
        self._timer: threading.Timer | None = None
        if first_piece_timeout is not None:
            # A weak reference: the timer must not keep an abandoned stream alive.
            self._timer = threading.Timer(first_piece_timeout, _expire, (weakref.ref(self), first_piece_timeout))
            self._timer.daemon = True
            self._timer.start()

    @property
    def text(self) -> str:
        """The text received so far."""
        return self._collector.text

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
        """Wait for the end of the stream and return the complete answer. Raises AutoGLMError."""
        for _ in self:
            pass
        assert self._result is not None
        return self._result

    def cancel(self) -> None:
        """Stop the request on the server; further iteration raises Cancelled. No-op after the end of the stream."""
        self.interrupt(Cancelled("the request was cancelled"))

    close = cancel

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_timer"):  # otherwise the constructor failed
            with contextlib.suppress(Exception):
                self.close()

    def _advance(self) -> Piece | None:
        """Receive the next response, or the end of the stream."""
        try:
            with self._reading:
                message = next(self._call)
            piece = self._collector.add(wire.read_response(message))
        except StopIteration:
            self._end()
            return None
        except grpc.RpcError as fault:
            error = from_status(fault.code(), fault.details(), self._server)
            if isinstance(error, RequestTimeout):
                self.interrupt(error)
            raise self._ended(error) from None
        except MalformedResponse as malformed:
            self.interrupt(malformed)
            raise
        except AutoGLMError as failure:
            raise self._ended(failure) from None
        if piece:
            self._stop_timer()
        return piece

    def _end(self) -> None:
        try:
            result = self._collector.result()
        except AutoGLMError as error:
            self._ended(error)
            return
        self._stop_timer()
        with self._lock:
            if not self._error:
                self._result = result

    def _ended(self, error: AutoGLMError) -> AutoGLMError:
        """Record that the server ended the stream with `error`, and return the first error of the stream."""
        self._stop_timer()
        with self._lock:
            self._error = self._error or error
            return self._error

    def _stop_timer(self) -> None:
        if self._timer:
            self._timer.cancel()

    def interrupt(self, error: AutoGLMError) -> None:
        """End the stream with `error`, unless it has ended, and stop the request on the server."""
        with self._lock:
            if self._error or self._result:
                return
            self._error = error
        self._stop_timer()
        self._leave(self._call, self._reading, self.request_id)


class Client(BaseClient[Stream]):
    """A blocking client, which any number of threads may share. `BaseClient` documents the arguments."""

    _open_channel = staticmethod(grpc.insecure_channel)

    def generate(
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
        """Send a request and wait for the complete answer. Raises AutoGLMError.

        Args:
            messages: an OpenAI-style chat, instead of `prompt`: a user turn, which may be empty if there is `audio`.
            images: in the order of their placeholders, like `audio`.
            request_id: unique among running requests; generated by default.
            options: such as max_tokens=200, stop=["。"], response_format={"type": "phone_action"} for an answer that
                always parses, or logprobs=3 for the log probability of each token and three alternatives.
        """
        with self._send(
            options, timeout, None, messages=messages, prompt=prompt, images=images, audio=audio, request_id=request_id
        ) as stream:
            return stream.result()

    def is_ready(self) -> bool:
        """Whether the server is reachable and reports the ensemble as ready."""
        try:
            return bool(self._stub.ModelReady(READY_REQUEST, timeout=self._connect_timeout).ready)
        except grpc.RpcError:
            return False

    def close(self) -> None:
        """Cancel running requests and close the connection."""
        if self._closed:
            return
        self._closed = True
        for stream in list(self._streams):
            stream.close()
        for thread in list(self._stopping):
            thread.join(STOP_SECONDS)
        self._channel.close()

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open_stream(self, request: Any, timeout: float, first_piece_timeout: float | None) -> Stream:
        call = self._stub.ModelStreamInfer(iter([request]), timeout=timeout)
        return Stream(
            call, self._leave, request_id=request.id, server=self.server, first_piece_timeout=first_piece_timeout
        )

    def _leave(self, call: Any, reading: threading.Lock, request_id: str) -> None:
        """Stop a request in a thread, which `close` waits for."""
        thread = threading.Thread(target=self._end, args=(call, reading, request_id), daemon=True)
        self._stopping.add(thread)
        thread.start()

    def _end(self, call: Any, reading: threading.Lock, request_id: str) -> None:
        """Send stop requests until the server has ended the request. `OpenCall` explains why the call stays open."""
        deadline = threading.Timer(STOP_SECONDS, call.cancel)
        deadline.daemon = True
        deadline.start()
        try:
            while not self._send_stop(request_id) and call.is_active():
                time.sleep(STOP_INTERVAL)
            with reading, contextlib.suppress(grpc.RpcError):
                for _ in call:
                    pass
        finally:
            deadline.cancel()
            self._stopping.discard(threading.current_thread())

    def _send_stop(self, request_id: str) -> bool:
        """Send one stop request; returns whether the server found the request."""
        request = iter([wire.stop_request(request_id)])
        with contextlib.suppress(grpc.RpcError, ValueError):  # the connection is closed
            return not any(
                message.error_message for message in self._stub.ModelStreamInfer(request, timeout=STOP_SECONDS)
            )
        return False


def _expire(reference: weakref.ref[Stream], seconds: float) -> None:
    stream = reference()
    if stream:
        stream.interrupt(RequestTimeout(f"first_piece_timeout of {seconds:g} s expired before the first piece arrived"))
