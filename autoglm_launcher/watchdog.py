"""Notices that a server no longer serves, also while Triton says that it is ready."""

from __future__ import annotations

import time
from collections.abc import Callable

from autoglm_launcher.probe import ProbeError, Sample, ask, responses_so_far
from autoglm_launcher.server import TritonServer

PROBE_INTERVAL_S = 15.0
PROBE_TIMEOUT_S = 30.0
RETRY_S = 2.0
PATIENCE = 3


class Watchdog:
    """Looks after one started server. check() is called often and is cheap between probes.

    A stub that dies is never restarted by Triton, and requests to it fail or hang for ever: so the stubs that were
    there when the server became ready must stay there. A stub that hangs shows in the probe: after patience probes
    in a row without an answer, while nobody else got a token either.
    """

    def __init__(
        self,
        server: TritonServer,
        sample: Sample,
        *,
        interval_s: float = PROBE_INTERVAL_S,
        timeout_s: float = PROBE_TIMEOUT_S,
        patience: int = PATIENCE,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._server = server
        self._sample = sample
        self._interval_s = interval_s
        self._timeout_s = timeout_s
        self._patience = patience
        self._clock = clock
        self._stubs = {process.pid: process.instance for process in server.processes() if process.kind == "stub"}
        self._next_probe = clock() + interval_s
        self._failures = 0

    def check(self) -> str | None:
        """Why the server must be restarted; None while it serves."""
        if not self._server.is_alive():
            return f"the server ended: {self._server.explain()}"
        there = {process.pid for process in self._server.processes()}
        gone = sorted(instance for pid, instance in self._stubs.items() if pid not in there)
        if gone:
            return f"the process of model instance {', '.join(gone)} died"
        if self._clock() < self._next_probe:
            return None
        failure = self._probe()
        self._failures = self._failures + 1 if failure else 0
        self._next_probe = self._clock() + (RETRY_S if failure else self._interval_s)
        return f"{self._failures} failed probe(s) in a row: {failure}" if self._failures >= self._patience else None

    def _probe(self) -> str | None:
        """What is wrong with the server, if anything."""
        before = self._responses()
        try:
            ask(self._server.http_address, self._sample, max_tokens=1, timeout_s=self._timeout_s)
        except ProbeError as error:
            # A probe that waits behind others is no fault.
            works_for_others = self._responses() > before >= 0
            return None if error.busy or works_for_others else str(error)
        return None

    def _responses(self) -> int:
        """How many responses anybody got so far; -1 when the server does not say."""
        try:
            return responses_so_far(self._server.http_address)
        except ProbeError:
            return -1
