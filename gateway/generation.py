"""The choices of one request, which the ensemble generates concurrently."""

import asyncio
import json
import secrets
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from autoglm_client import RequestTimeout
from autoglm_client.result import Response

from gateway.backend import TritonBackend
from gateway.chat_input import ChatInput
from gateway.errors import ApiError, from_exception
from gateway.metrics import GatewayMetrics
from gateway.schema import GenerationRequest


class ChoiceGenerator:
    """Sends a request to the ensemble once for each of its `n` choices. timeout_s: limit of a request's duration."""

    def __init__(self, backend: TritonBackend, metrics: GatewayMetrics, timeout_s: float) -> None:
        self._backend = backend
        self._metrics = metrics
        self._timeout_s = timeout_s

    async def responses(
        self, chat: ChatInput, body: GenerationRequest, request_id: str
    ) -> AsyncGenerator[list[tuple[int, Response]], None]:
        """Yield the responses of all choices as (index of the choice, response), in batches of those that are ready.

        Closing the generator before its end stops all choices. Raises ApiError if one of them fails.
        """
        begun: float | None = time.monotonic()
        # Requests are stopped by their id on the server, so it must be unique; callers may reuse theirs.
        unique = f"{request_id}/{secrets.token_hex(4)}"
        arrived: asyncio.Queue[tuple[int, Response | Exception | None]] = asyncio.Queue()
        tasks = [
            asyncio.ensure_future(self._forward(chat, body, f"{unique}/{choice}", choice, arrived))
            for choice in range(body.n or 1)
        ]
        open_choices = len(tasks)
        try:
            while open_choices:
                batch = [await arrived.get()]
                while not arrived.empty():
                    batch.append(arrived.get_nowait())
                open_choices -= sum(response is None for _, response in batch)
                ready = [(choice, each) for choice, each in batch if isinstance(each, Response)]
                if ready and begun is not None:
                    self._metrics.first_token_seconds.observe(time.monotonic() - begun)
                    begun = None
                for _, response in ready:
                    if response.finish_reason:
                        self._count(json.loads(response.usage))
                if ready:
                    yield ready
                for _, error in batch:
                    if isinstance(error, Exception):
                        raise self._api_error(error, chat, body) from error
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)

    async def _forward(
        self,
        chat: ChatInput,
        body: GenerationRequest,
        request_id: str,
        choice: int,
        arrived: asyncio.Queue[tuple[int, Response | Exception | None]],
    ) -> None:
        """Put the responses of one choice into `arrived`, then None or the exception."""
        timeout = min(body.timeout or self._timeout_s, self._timeout_s)
        answer = self._backend.generate(
            chat, body.parameters(choice), request_id, stream=bool(body.stream), timeout=timeout
        )
        try:
            async with aclosing(answer):
                async for response in answer:
                    arrived.put_nowait((choice, response))
            arrived.put_nowait((choice, None))
        except Exception as error:
            arrived.put_nowait((choice, error))

    def _api_error(self, error: Exception, chat: ChatInput, body: GenerationRequest) -> ApiError:
        if isinstance(error, RequestTimeout) and body.timeout is not None and body.timeout <= self._timeout_s:
            # The caller chose this timeout: not an error of the server.
            message = f"timeout of {body.timeout:g} s expired before the answer was complete"
            return ApiError(408, message, "timeout", "timeout")
        return from_exception(error, chat.names | body.names)

    def _count(self, usage: dict[str, Any]) -> None:
        self._metrics.prompt_tokens.inc(usage["prompt_tokens"])
        self._metrics.completion_tokens.inc(usage["completion_tokens"])
