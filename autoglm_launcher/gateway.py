"""The OpenAI-compatible gateway beside the server, as a process of its own."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from http.client import HTTPConnection, HTTPException
from pathlib import Path

from autoglm_launcher.console import LauncherError, complain, say
from autoglm_launcher.managed_process import Supervised
from autoglm_launcher.ports import check_ports, reachable

GRACE_S = 11.0  # its own for running answers is 10 s (gateway/__main__.py)
POLL_S = 0.1
LISTENS_WITHIN_S = 60.0
READY_WITHIN_S = 60.0
FIRST_BACK_OFF_S = 1.0
LONGEST_BACK_OFF_S = 60.0
PROVEN_AFTER_S = 300.0


class Gateway(Supervised):
    """`python -m gateway` in front of a server.

    A gateway that dies is started again by itself (`revive`): answers over gRPC and Triton's HTTP go on meanwhile, and
    loading a model again would help nobody. It is likewise left alone when the server is restarted: its callers are
    told 503 with Retry-After, upon which OpenAI's clients ask again. It ends with the launcher.

    triton: the server's gRPC address. environment: what its configuration is read from.
    """

    def __init__(
        self, triton: str, host: str, port: int, log_path: Path | None, environment: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(environment or {}, log_path, GRACE_S)
        self.host = host
        self.port = port
        self._triton = triton
        self._back_off_s = FIRST_BACK_OFF_S
        self._started = 0.0
        self._revive_at: float | None = None

    @property
    def url(self) -> str:
        return f"http://{self._address}"

    def command(self) -> list[str]:
        where = ["--host", self.host, "--port", str(self.port)]
        return [sys.executable, "-m", "gateway", "--triton", self._triton, *where]

    def start(self) -> None:
        """Raises LauncherError on a port that is taken."""
        check_ports({"gateway": self.port}, self.host)
        super().start()
        self._started = time.monotonic()

    def wait_listening(self) -> None:
        """Wait until it takes requests. Raises LauncherError when it ends, or does not in time."""
        self._wait("/health", LISTENS_WITHIN_S, "started")

    def wait_ready(self) -> None:
        """Wait until it has had an answer from the server. Raises LauncherError when it ends, or has none in time."""
        self._wait("/ready", READY_WITHIN_S, "ready")

    def revive(self) -> None:
        """Start it again when it has ended, after a wait that grows while it keeps ending. To be called often."""
        now = time.monotonic()
        if self._revive_at is not None:
            if now >= self._revive_at:
                self._revive_at = None
                self._start_again()
        elif not self.is_alive():
            if now - self._started > PROVEN_AFTER_S:
                self._back_off_s = FIRST_BACK_OFF_S
            self._give_up_for_now(f"the gateway ended: {self.explain()}")

    def _start_again(self) -> None:
        self.stop(now=True)  # what a killed supervisor left
        try:
            self.start()
        except LauncherError as error:
            self._give_up_for_now(str(error))
        else:
            say("the gateway is started again")

    def _give_up_for_now(self, reason: str) -> None:
        complain(f"{reason}; starting it again in {self._back_off_s:.0f} s, the server goes on")
        self._revive_at = time.monotonic() + self._back_off_s
        self._back_off_s = min(2 * self._back_off_s, LONGEST_BACK_OFF_S)

    @property
    def _address(self) -> str:
        return f"{reachable(self.host)}:{self.port}"

    def _wait(self, path: str, timeout_s: float, state: str) -> None:
        begin = time.monotonic()
        while (fault := fault_of(self._address, path)) is not None:
            if not self.is_alive():
                raise LauncherError(f"the gateway did not start: {self.explain()}")
            if time.monotonic() - begin > timeout_s:
                raise LauncherError(f"the gateway is not {state} after {timeout_s:.0f} s: {fault}")
            time.sleep(POLL_S)


def fault_of(address: str, path: str = "/ready", timeout_s: float = 15.0) -> str | None:
    """Why a gateway does not answer 200 to a GET of /health or /ready; None if it does."""
    connection = HTTPConnection(address, timeout=timeout_s)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        body = response.read().decode(errors="replace")
        return None if response.status == 200 else _message_of(body) or f"HTTP {response.status}"
    except (OSError, HTTPException) as error:
        return f"no answer from {address}: {error or type(error).__name__}"
    finally:
        connection.close()


def _message_of(body: str) -> str:
    """The message in OpenAI's shape of an error; else the beginning of what came."""
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return body[:300]
