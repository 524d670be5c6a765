"""What a user of a streamed answer sees, as Locust events."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

FIRST, BETWEEN, TOTAL = "time to first token", "time between tokens", "total"


class Meter:
    """Times one answer; `fire` is Locust's `events.request.fire`. Locust counts in milliseconds.

    A failed answer counts once, as a failure of "total".
    """

    def __init__(self, protocol: str, fire: Callable[..., Any]) -> None:
        self._protocol = protocol
        self._fire = fire
        self._begun = time.perf_counter()
        self._last = 0.0

    def piece(self, tokens: int) -> None:
        """A piece of that many tokens has come; those of one piece share the time since the piece before."""
        now = time.perf_counter()
        if not self._last:
            self._report(FIRST, now - self._begun, tokens)
        elif tokens:
            for _ in range(tokens):
                self._report(BETWEEN, (now - self._last) / tokens, 1)
        self._last = now

    def end(self, error: Exception | None = None) -> None:
        """The answer is complete, or `error` ended it."""
        self._report(TOTAL, time.perf_counter() - self._begun, 0, error)

    def _report(self, name: str, seconds: float, length: int, error: Exception | None = None) -> None:
        self._fire(
            request_type=self._protocol,
            name=name,
            response_time=seconds * 1000,
            response_length=length,
            exception=error,
            context={},
        )
