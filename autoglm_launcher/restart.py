"""Restarts processes that fail, after waits that double while they keep failing."""

import time
from collections.abc import Callable

from autoglm_launcher.console import LauncherError, complain, say
from autoglm_launcher.managed_process import ManagedProcess

FIRST_WAIT_S = 1.0
MAX_WAIT_S = 60.0
PROVEN_AFTER_S = 300.0  # a process that ran this long starts over with the first wait


class Restarter:
    """Keeps one started process running. Call check() frequently; it never waits, except for start().

    start: starts the process; raises LauncherError. failure: why it must be restarted; None while it serves.
    """

    def __init__(
        self,
        process: ManagedProcess,
        start: Callable[[], None],
        failure: Callable[[], str | None],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._process = process
        self._start = start
        self._failure = failure
        self._clock = clock
        self._started_at = clock()
        self._restart_at: float | None = None
        self._wait_s = FIRST_WAIT_S

    def check(self) -> None:
        """Restart the process if it has failed and its wait is over."""
        now = self._clock()
        if self._restart_at is None:
            if (reason := self._failure()) is None:
                return
            if now - self._started_at > PROVEN_AFTER_S:
                self._wait_s = FIRST_WAIT_S
            self._schedule(reason)
        elif now >= self._restart_at:
            try:
                self._start()
            except LauncherError as error:
                self._schedule(str(error))
            else:
                self._started_at, self._restart_at = self._clock(), None
                say(f"{self._process.name} is running again")

    def _schedule(self, reason: str) -> None:
        complain(f"{reason}; restarting in {self._wait_s:.0f} s")
        self._process.stop(now=True)
        self._restart_at = self._clock() + self._wait_s
        self._wait_s = min(2 * self._wait_s, MAX_WAIT_S)
