"""The ports of what is served, and who else has them."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields

from autoglm_launcher.console import LauncherError


@dataclass(frozen=True)
class Ports:
    """The three of a tritonserver."""

    http: int = 8000
    grpc: int = 8001
    metrics: int = 8002

    @classmethod
    def free(cls) -> Ports:
        return cls(*free_ports(len(fields(cls))))

    def check(self, host: str) -> None:
        """See check_ports."""
        check_ports(asdict(self), host)


def free_ports(count: int) -> list[int]:
    """Ports of the loopback that nobody listens on now."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def check_ports(ports: Mapping[str, int], host: str) -> None:
    """Raise LauncherError unless all differ and a server will be able to listen on each. NAME has the option
    --NAME-port."""
    if len(set(ports.values())) < len(ports):
        raise LauncherError(f"the ports must differ: {', '.join(f'{k} {v}' for k, v in ports.items())}")
    for name, port in ports.items():
        with socket.socket() as probe:
            # As the server binds: the port of a connection that has just closed is no obstacle.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except OSError as error:
                raise LauncherError(
                    f"{name} port {port} cannot be used on {host} ({error.strerror}): "
                    f"stop what uses it, or give --{name}-port another number"
                ) from None


def reachable(host: str) -> str:
    """Where this machine reaches what listens on host."""
    return "127.0.0.1" if host == "0.0.0.0" else host
