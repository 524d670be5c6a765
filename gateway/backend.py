"""The ensemble over gRPC: one connection, a stream for each request."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from typing import Any

import grpc
import numpy as np
from autoglm_client import wire
from autoglm_client.errors import Cancelled, RequestTimeout, ServerError, from_status, from_text
from autoglm_client.open_call import OpenCall
from autoglm_client.result import Response
from tritonclient.grpc import service_pb2_grpc

from gateway.chat_input import Content

CONNECT_SECONDS = 5.0
TOKENIZE_SECONDS = 30.0
GRACE_SECONDS = 5.0  # the engine itself ends a request whose time is over: only if it does not, the call does
PREPROCESS = "preprocess"


class Ensemble:
    """`on_abandoned` is called when a request has been left before its end, with the seconds until the server ended it
    too (None: it did not in time). `last_answer` is the moment, by `time.monotonic`, of the last sign that it works."""

    def __init__(self, address: str, on_abandoned: Callable[[float | None], None] = lambda seconds: None) -> None:
        self.address = address
        self.last_answer: float | None = None
        self._on_abandoned = on_abandoned
        self._channel = grpc.aio.insecure_channel(address, options=wire.channel_options(CONNECT_SECONDS))
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)
        self._ending: set[asyncio.Task[None]] = set()

    async def ask(
        self, content: Content, parameters: dict[str, Any], request_id: str, *, stream: bool, timeout: float
    ) -> AsyncGenerator[Response, None]:
        """The responses to one request, the last one with a finish reason.

        Args:
            request_id: one that no other request has: by it the request is stopped.
            timeout: seconds for the whole answer.

        A generator that is closed before its end ends the request on the server too. Raises AutoGLMError.
        """
        request = _request(content, parameters, request_id, stream, timeout)
        call = OpenCall(self._stub, request, timeout + GRACE_SECONDS)
        ended = False
        finish_reason = ""
        try:
            while (message := await call.read()) is not None:
                if message.error_message:
                    ended = True
                    raise from_text(message.error_message)
                response = wire.read_response(message)
                finish_reason = response.finish_reason
                if finish_reason:
                    ended = True
                    _check_end(finish_reason)
                self.last_answer = time.monotonic()
                yield response
            ended = True
            if not finish_reason:
                raise ServerError("the stream ended without a finish reason")
        except grpc.RpcError as fault:
            # The server did not say that the request has ended, unless it is the one that cannot be reached.
            ended = fault.code() is grpc.StatusCode.UNAVAILABLE
            raise from_status(fault.code(), fault.details(), self.address) from None
        finally:
            if not ended:
                task = asyncio.get_running_loop().create_task(self._abandon(call))
                self._ending.add(task)
                task.add_done_callback(self._ending.discard)

    async def tokenize(self, content: Content, request_id: str) -> list[int]:
        """The token ids of a prompt, images expanded. Raises AutoGLMError."""
        request = _request(content, {}, request_id, False, TOKENIZE_SECONDS)
        request.model_name = PREPROCESS
        request.outputs.add(name="PROMPT_IDS")
        try:
            answer = await self._stub.ModelInfer(request, timeout=TOKENIZE_SECONDS)
        except grpc.RpcError as fault:
            if fault.code() is grpc.StatusCode.INVALID_ARGUMENT:
                raise from_text(fault.details() or "") from None
            raise from_status(fault.code(), fault.details(), self.address) from None
        ids: list[int] = np.frombuffer(answer.raw_output_contents[0], "<i4").tolist()
        return ids

    async def aclose(self) -> None:
        """Wait for what is being stopped, and close the connection."""
        if self._ending:
            await asyncio.wait(self._ending)
        await self._channel.close()

    async def _abandon(self, call: OpenCall) -> None:
        """Stop a request that nobody waits for any more."""
        begun = time.monotonic()
        ended = await call.end()
        self._on_abandoned(time.monotonic() - begun if ended else None)


def _request(content: Content, parameters: dict[str, Any], request_id: str, stream: bool, timeout: float) -> Any:
    media = (content.images, content.audio)
    return wire.inference_request(
        content.messages, content.prompt, *media, parameters, request_id, stream=stream, timeout=timeout
    )


def _check_end(finish_reason: str) -> None:
    if finish_reason == "cancelled":
        raise Cancelled("the server was told to stop this request")
    if finish_reason == "timeout":
        raise RequestTimeout("the request's time ran out")
