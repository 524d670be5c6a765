"""The choices of one request, which run side by side in the ensemble."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from autoglm_client import RequestTimeout
from autoglm_client.result import Response

from gateway.backend import Ensemble
from gateway.chat_input import Content
from gateway.errors import ApiError, from_fault
from gateway.metrics import Metrics
from gateway.schema import Sampling


class Generation:
    """Asks the ensemble `n` times the same. `longest` are the seconds that a request may take."""

    def __init__(self, ensemble: Ensemble, metrics: Metrics, longest: float) -> None:
        self._ensemble = ensemble
        self._metrics = metrics
        self._longest = longest

    async def pieces(
        self, content: Content, body: Sampling, request_id: str
    ) -> AsyncGenerator[list[tuple[int, Response]], None]:
        """The responses of all choices, those together that have come together, each with the number of its choice.

        Whoever leaves early stops them all. Raises ApiError.
        """
        begun: float | None = time.monotonic()
        # Triton's id has an end that is ours alone: callers may use theirs twice, and by this one requests are stopped.
        unique = f"{request_id}/{secrets.token_hex(4)}"
        arrived: asyncio.Queue[tuple[int, Response | Exception | None]] = asyncio.Queue()
        tasks = [
            asyncio.ensure_future(self._pump(content, body, f"{unique}/{choice}", choice, arrived))
            for choice in range(body.n or 1)
        ]
        open_choices = len(tasks)
        try:
            while open_choices:
                batch = [await arrived.get()]
                while not arrived.empty():
                    batch.append(arrived.get_nowait())
                open_choices -= sum(response is None for _, response in batch)
                responses = [(choice, each) for choice, each in batch if isinstance(each, Response)]
                if responses and begun is not None:
                    self._metrics.first_token_seconds.observe(time.monotonic() - begun)
                    begun = None
                for _, response in responses:
                    if response.finish_reason:
                        self._count(json.loads(response.usage))
                if responses:
                    yield responses
                for _, fault in batch:
                    if isinstance(fault, Exception):
                        raise self._error(fault, content, body) from fault
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)

    async def _pump(
        self,
        content: Content,
        body: Sampling,
        request_id: str,
        choice: int,
        arrived: asyncio.Queue[tuple[int, Response | Exception | None]],
    ) -> None:
        timeout = min(body.timeout or self._longest, self._longest)
        answer = self._ensemble.ask(
            content, body.parameters(choice), request_id, stream=bool(body.stream), timeout=timeout
        )
        try:
            async with aclosing(answer):
                async for response in answer:
                    arrived.put_nowait((choice, response))
            arrived.put_nowait((choice, None))
        except Exception as fault:
            arrived.put_nowait((choice, fault))

    def _error(self, fault: Exception, content: Content, body: Sampling) -> ApiError:
        if isinstance(fault, RequestTimeout) and body.timeout is not None and body.timeout <= self._longest:
            # The caller's own choice is no fault of the server.
            return ApiError(408, f"{fault} ({body.timeout:g} s)", "timeout", "timeout")
        return from_fault(fault, content.names | body.names)

    def _count(self, usage: dict[str, Any]) -> None:
        self._metrics.prompt_tokens.inc(usage["prompt_tokens"])
        self._metrics.completion_tokens.inc(usage["completion_tokens"])
