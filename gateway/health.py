"""Whether the ensemble answers: the last answer to anybody is the proof, or one token asked for it."""

from __future__ import annotations

import asyncio
import time
import uuid
from contextlib import aclosing

from autoglm_client import AutoGLMError

from gateway.backend import Ensemble
from gateway.chat_input import of_prompt

PROBE_SECONDS = 10.0


class Readiness:
    """`within` are the seconds for which an answer proves that the server works."""

    def __init__(self, ensemble: Ensemble, within: float) -> None:
        self._ensemble = ensemble
        self._within = within
        self._probe: asyncio.Task[None] | None = None

    async def fault(self) -> str | None:
        """Why the server does not answer; None if it does. Callers who ask together share one probe."""
        last = self._ensemble.last_answer
        if last is not None and time.monotonic() - last < self._within:
            return None
        if self._probe is None or self._probe.done():
            self._probe = asyncio.get_running_loop().create_task(self._ask())
        try:
            await asyncio.shield(self._probe)
        except AutoGLMError as error:
            return str(error)
        return None

    async def _ask(self) -> None:
        parameters = {"max_tokens": 1, "priority": 1}
        answer = self._ensemble.ask(
            of_prompt("ready"), parameters, f"ready-{uuid.uuid4().hex}", stream=False, timeout=PROBE_SECONDS
        )
        async with aclosing(answer):
            async for _ in answer:
                pass
