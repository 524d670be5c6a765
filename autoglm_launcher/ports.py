"""The ports to serve on, and whether they are free."""

import socket
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields
from http.client import HTTPException

from autoglm_launcher.console import LauncherError


@dataclass(frozen=True)
class Ports:
    """The three ports of a tritonserver."""

    http: int = 8000
    grpc: int = 8001
    metrics: int = 8002

    @classmethod
    def free(cls) -> "Ports":
        return cls(*free_ports(len(fields(cls))))

    def check(self, host: str) -> None:
        """See check_ports."""
        check_ports(asdict(self), host)


def free_ports(count: int) -> list[int]:
    """Ports of the loopback interface that are free now."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def check_ports(ports: Mapping[str, int], host: str) -> None:
    """Raise LauncherError unless the ports differ and each can be listened on. The port `name` has the option
    --name-port."""
    if len(set(ports.values())) < len(ports):
        raise LauncherError(f"the ports must differ: {', '.join(f'{k} {v}' for k, v in ports.items())}")
    for name, port in ports.items():
        with socket.socket() as probe:
            # As servers do: a port whose connections have just closed is free.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except OSError as error:
                raise LauncherError(
                    f"{name} port {port} cannot be used on {host} ({error.strerror}): "
                    f"stop the process that uses it, or choose another --{name}-port"
                ) from None


def no_answer(address: str, error: OSError | HTTPException) -> str:
    """A sentence about a request that got no complete response."""
    reason = "timed out" if isinstance(error, TimeoutError) else getattr(error, "strerror", None) or "connection lost"
    return f"no answer from {address} ({reason})"


def reachable(host: str) -> str:
    """The address at which this machine reaches a server that listens on host."""
    return "127.0.0.1" if host == "0.0.0.0" else host
