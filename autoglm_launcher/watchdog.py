"""Detects that a server no longer serves, even while Triton reports that it is ready."""

import time
from collections.abc import Callable

from autoglm_launcher.probe import ProbeError, Sample, ask, count_responses
from autoglm_launcher.server import TritonServer

PROBE_INTERVAL_S = 15.0
PROBE_TIMEOUT_S = 30.0
RETRY_S = 2.0
PATIENCE = 3


class Watchdog:
    """Checks one started server. Call check() frequently; it is cheap between probes.

    Triton never restarts a stub that dies, and requests to it fail or hang forever: so every stub that ran when the
    server became ready must keep running. A hung stub is detected by the probe: the server has failed when
    `patience` probes in a row got no answer and no other request received a token meanwhile.
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
        self.reset()

    def reset(self) -> None:
        """Start over with the stubs that run now, after the server has been restarted."""
        self._stubs = {process.pid: process.instance for process in self._server.processes() if process.kind == "stub"}
        self._next_probe = self._clock() + self._interval_s
        self._failures = 0

    def check(self) -> str | None:
        """Why the server must be restarted; None while it serves."""
        if reason := self._server.failure():
            return reason
        running = {process.pid for process in self._server.processes()}
        dead = sorted(instance for pid, instance in self._stubs.items() if pid not in running)
        if dead:
            return f"the process of model instance {', '.join(dead)} died"
        if self._clock() < self._next_probe:
            return None
        failure = self._probe()
        self._failures = self._failures + 1 if failure else 0
        self._next_probe = self._clock() + (RETRY_S if failure else self._interval_s)
        return f"{self._failures} failed probe(s) in a row: {failure}" if self._failures >= self._patience else None

    def _probe(self) -> str | None:
        """Why the server failed the probe; None if it did not."""
        before = self._responses()
        try:
            ask(self._server.http_address, self._sample, max_tokens=1, timeout_s=self._timeout_s)
        except ProbeError as error:
            # A probe may time out because it is queued after other requests.
            serves_others = self._responses() > before >= 0
            return None if error.busy or serves_others else str(error)
        return None

    def _responses(self) -> int:
        """The number of responses sent to any caller; -1 if unknown."""
        try:
            return count_responses(self._server.http_address)
        except ProbeError:
            return -1
