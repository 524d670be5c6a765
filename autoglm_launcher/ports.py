"""The three ports of a server."""

from __future__ import annotations

import socket
from contextlib import ExitStack
from dataclasses import dataclass, fields

from autoglm_launcher.errors import LauncherError


@dataclass(frozen=True)
class Ports:
    http: int = 8000
    grpc: int = 8001
    metrics: int = 8002

    @classmethod
    def free(cls) -> Ports:
        """Three ports of the loopback that nobody listens on now."""
        with ExitStack() as stack:
            sockets = [stack.enter_context(socket.socket()) for _ in fields(cls)]
            for each in sockets:
                each.bind(("127.0.0.1", 0))
            return cls(*(each.getsockname()[1] for each in sockets))

    def check(self, host: str) -> None:
        """Raise LauncherError unless the three differ and the server will be able to listen on each."""
        ports = {field.name: getattr(self, field.name) for field in fields(self)}
        if len(set(ports.values())) < len(ports):
            raise LauncherError(f"the three ports must differ: {', '.join(f'{k} {v}' for k, v in ports.items())}")
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
