"""Latencies of a streamed answer as Locust events."""

import time
from collections.abc import Callable
from typing import Any

FIRST, BETWEEN, TOTAL = "time to first token", "time between tokens", "total"


class Meter:
    """Measures one answer and reports it to `fire`, Locust's `events.request.fire`, in milliseconds.

    A failed answer is one failure of "total".
    """

    def __init__(self, protocol: str, fire: Callable[..., Any]) -> None:
        self._protocol = protocol
        self._fire = fire
        self._start_time = time.perf_counter()
        self._last_time = 0.0

    def piece(self, num_tokens: int) -> None:
        """Record a piece. Its tokens share the time since the previous piece equally."""
        now = time.perf_counter()
        if not self._last_time:
            self._report(FIRST, now - self._start_time, num_tokens)
        elif num_tokens:
            for _ in range(num_tokens):
                self._report(BETWEEN, (now - self._last_time) / num_tokens, 1)
        self._last_time = now

    def end(self, error: Exception | None = None) -> None:
        """Record the end of the answer. `error`: the reason if it failed."""
        self._report(TOTAL, time.perf_counter() - self._start_time, 0, error)

    def _report(self, name: str, seconds: float, length: int, error: Exception | None = None) -> None:
        self._fire(
            request_type=self._protocol,
            name=name,
            response_time=seconds * 1000,
            response_length=length,
            exception=error,
            context={},
        )
