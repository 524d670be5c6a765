"""Readiness: proven by the last answer to any request, or else by generating one token."""

import asyncio
import time
import uuid
from contextlib import aclosing

from autoglm_client import AutoGLMError

from gateway.backend import TritonBackend
from gateway.chat_input import from_prompt
from gateway.errors import from_exception

PROBE_SECONDS = 10.0


class ReadinessProbe:
    """valid_s: seconds for which an answer proves that the server is ready."""

    def __init__(self, backend: TritonBackend, valid_s: float) -> None:
        self._backend = backend
        self._valid_s = valid_s
        self._probe: asyncio.Task[None] | None = None

    async def fault(self) -> str | None:
        """Why the server is not ready, None if it is. Concurrent callers share one probe."""
        last = self._backend.last_answer
        if last is not None and time.monotonic() - last < self._valid_s:
            return None
        if self._probe is None or self._probe.done():
            self._probe = asyncio.get_running_loop().create_task(self._generate())
        try:
            await asyncio.shield(self._probe)
        except AutoGLMError as error:
            return from_exception(error, {}).message
        return None

    async def _generate(self) -> None:
        parameters = {"max_tokens": 1, "priority": 1}
        answer = self._backend.generate(
            from_prompt("ready"), parameters, f"ready-{uuid.uuid4().hex}", stream=False, timeout=PROBE_SECONDS
        )
        async with aclosing(answer):
            async for _ in answer:
                pass
