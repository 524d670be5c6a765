"""The Triton ensemble over gRPC: one channel, one stream per request."""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from typing import Any

import grpc
import numpy as np
from autoglm_client import wire
from autoglm_client.errors import AutoGLMError, MalformedResponse, ServerError, from_status
from autoglm_client.open_call import OpenCall
from autoglm_client.result import Response
from tritonclient.grpc import service_pb2_grpc

from gateway.chat_input import ChatInput

CONNECT_SECONDS = 5.0
TOKENIZE_SECONDS = 30.0
GRACE_SECONDS = 5.0  # the engine enforces a request's timeout; the deadline of the call is a fallback
PREPROCESS = "preprocess"


class TritonBackend:
    """`last_answer` is the time (`time.monotonic`) of the last response.

    on_stopped: called for each request that was closed before its end, with the seconds that the server took to stop
        it (None: it did not stop in time).
    """

    def __init__(self, address: str, on_stopped: Callable[[float | None], None] = lambda seconds: None) -> None:
        self.address = address
        self.last_answer: float | None = None
        self._on_stopped = on_stopped
        self._channel = grpc.aio.insecure_channel(address, options=wire.channel_options(CONNECT_SECONDS))
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)
        self._stopping: set[asyncio.Task[None]] = set()

    async def generate(
        self, chat: ChatInput, parameters: dict[str, Any], request_id: str, *, stream: bool, timeout: float
    ) -> AsyncGenerator[Response, None]:
        """Yield the responses to one request, the last one with a finish reason. Raises AutoGLMError.

        Closing the generator before its end stops the request on the server.

        Args:
            request_id: unique among running requests; stop requests refer to it.
            timeout: seconds for the whole answer.
        """
        request = _request(chat, parameters, request_id, stream, timeout)
        call = OpenCall(self._stub, request, timeout + GRACE_SECONDS)
        ended = False
        finish_reason = ""
        try:
            while (message := await call.read()) is not None:
                response = wire.read_response(message)
                finish_reason = response.finish_reason
                ended = bool(finish_reason)
                self.last_answer = time.monotonic()
                yield response
            if not finish_reason:
                raise ServerError("the stream ended without a finish reason")
        except AutoGLMError as error:
            ended = not isinstance(error, MalformedResponse)  # the request may still run
            raise
        except grpc.RpcError as fault:
            # The request may still run, unless the server cannot be reached.
            ended = fault.code() is grpc.StatusCode.UNAVAILABLE
            raise from_status(fault.code(), fault.details(), self.address) from None
        finally:
            if not ended:
                task = asyncio.get_running_loop().create_task(self._stop(call))
                self._stopping.add(task)
                task.add_done_callback(self._stopping.discard)

    async def tokenize(self, chat: ChatInput, request_id: str) -> list[int]:
        """The token ids of a prompt, image placeholders expanded. Raises AutoGLMError."""
        request = _request(chat, {}, request_id, False, TOKENIZE_SECONDS)
        request.model_name = PREPROCESS
        request.outputs.add(name="PROMPT_IDS")
        try:
            answer = await self._stub.ModelInfer(request, timeout=TOKENIZE_SECONDS)
        except grpc.RpcError as fault:
            raise from_status(fault.code(), fault.details(), self.address) from None
        ids: list[int] = np.frombuffer(answer.raw_output_contents[0], "<i4").tolist()
        return ids

    async def aclose(self) -> None:
        """Wait for requests that are being stopped, and close the channel."""
        if self._stopping:
            await asyncio.wait(self._stopping)
        await self._channel.close()

    async def _stop(self, call: OpenCall) -> None:
        begun = time.monotonic()
        ended = await call.end()
        self._on_stopped(time.monotonic() - begun if ended else None)


def _request(chat: ChatInput, parameters: dict[str, Any], request_id: str, stream: bool, timeout: float) -> Any:
    content: dict[str, Any] = {name: getattr(chat, name) for name in ("messages", "prompt", "images", "audio")}
    return wire.inference_request(parameters, **content, request_id=request_id, stream=stream, timeout=timeout)
