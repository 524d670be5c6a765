"""The OpenAI-compatible gateway, in a process next to the server."""

import json
import sys
from collections.abc import Mapping
from http.client import HTTPConnection, HTTPException
from pathlib import Path

from autoglm_launcher.managed_process import ManagedProcess
from autoglm_launcher.ports import check_ports, no_answer, reachable

GRACE_S = 11.0  # the gateway itself gives running responses 10 s (gateway/__main__.py)
LISTENING_TIMEOUT_S = 60.0
READY_TIMEOUT_S = 60.0


class GatewayProcess(ManagedProcess):
    """`python -m gateway` in front of a server.

    It is restarted independently of the server: gRPC and HTTP requests continue, and no model is loaded again. It also
    stays up while the server restarts: its callers get 503 with Retry-After, upon which OpenAI's clients retry.

    triton: the server's gRPC address. environment: variables that configure the gateway.
    """

    name = "the gateway"

    def __init__(
        self, *, triton: str, host: str, port: int, log_path: Path | None, environment: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(environment or {}, log_path, GRACE_S)
        self.host = host
        self.port = port
        self._triton = triton

    @property
    def address(self) -> str:
        """host:port"""
        return f"{reachable(self.host)}:{self.port}"

    @property
    def url(self) -> str:
        return f"http://{self.address}"

    def command(self) -> list[str]:
        listen = ["--host", self.host, "--port", str(self.port)]
        return [sys.executable, "-m", "gateway", "--triton", self._triton, *listen]

    def start(self) -> None:
        """Raises LauncherError when the port is taken."""
        check_ports({"gateway": self.port}, self.host)
        super().start()

    def wait_listening(self) -> None:
        """Wait until it accepts requests. Raises LauncherError when it ends, or on timeout."""
        self.wait_until("started", lambda: fault_of(self.address, "/health"), LISTENING_TIMEOUT_S)

    def wait_ready(self) -> None:
        """Wait until it has reached the server. Raises LauncherError when it ends, or on timeout."""
        self.wait_until("ready", lambda: fault_of(self.address, "/ready"), READY_TIMEOUT_S)


def fault_of(address: str, path: str = "/ready", timeout_s: float = 15.0) -> str | None:
    """Why a gateway does not answer 200 to a GET of /health or /ready; None if it does."""
    connection = HTTPConnection(address, timeout=timeout_s)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        body = response.read().decode(errors="replace")
        return None if response.status == 200 else _message_of(body) or f"HTTP {response.status}"
    except (OSError, HTTPException) as error:
        return no_answer(address, error)
    finally:
        connection.close()


def _message_of(body: str) -> str:
    """The message of an OpenAI-style error; else the beginning of the body."""
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return body[:300]
