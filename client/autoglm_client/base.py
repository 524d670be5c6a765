"""The common part of the blocking and the asyncio client."""

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, Generic, TypeVar

from tritonclient.grpc import service_pb2, service_pb2_grpc

from autoglm_client import wire
from autoglm_client.errors import Cancelled
from autoglm_client.media import AudioSource, ImageSource
from autoglm_client.wire import Messages, SamplingValue

GRACE_SECONDS = 1.0  # the server enforces the timeout; the deadline of the call is a fallback
READY_REQUEST = service_pb2.ModelReadyRequest(name=wire.ENSEMBLE)

AnyStream = TypeVar("AnyStream")


class BaseClient(ABC, Generic[AnyStream]):
    """A connection to the server for any number of concurrent requests.

    Args:
        server: host:port of gRPC.
        connect_timeout: seconds to establish the connection.
        first_piece_timeout: seconds until the first piece of a streamed answer; a request can override it.
        timeout: seconds for the whole request; a request can override it.
    """

    _open_channel: Callable[..., Any]

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
        self._channel = self._open_channel(server, options=wire.channel_options(connect_timeout))
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)
        self._streams: weakref.WeakSet[AnyStream] = weakref.WeakSet()
        self._stopping: set[Any] = set()  # threads or tasks that stop abandoned requests
        self._closed = False

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
        **options: SamplingValue,
    ) -> AnyStream:
        """Send a request and stream the answer. The arguments are those of `generate`.

        An asyncio client must call it in a running event loop.
        """
        first = self._first_piece_timeout if first_piece_timeout is None else first_piece_timeout
        return self._send(
            options, timeout, first, messages=messages, prompt=prompt, images=images, audio=audio, request_id=request_id
        )

    def _send(
        self, options: dict[str, Any], timeout: float | None, first_piece_timeout: float | None, **inputs: Any
    ) -> AnyStream:
        """Send a request. `first_piece_timeout` is None for an answer in one piece."""
        if self._closed:
            raise Cancelled("the client is closed")
        timeout = self._timeout if timeout is None else timeout
        request = wire.inference_request(options, **inputs, stream=first_piece_timeout is not None, timeout=timeout)
        stream = self._open_stream(request, timeout + GRACE_SECONDS, first_piece_timeout)
        self._streams.add(stream)
        return stream

    @abstractmethod
    def _open_stream(self, request: Any, timeout: float, first_piece_timeout: float | None) -> AnyStream: ...
