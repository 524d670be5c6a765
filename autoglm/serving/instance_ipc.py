"""What instances of one model tell each other: Triton gives a request to any of them, and each is a process."""

import logging
import os
import socket
import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

log = logging.getLogger(__name__)

SOCKETS = Path("/proc/net/unix")
SECONDS = 0.1  # that a sibling has to answer
LONGEST = 65536  # bytes of a message
CREDENTIALS = struct.Struct("3i")  # pid, uid, gid


class Siblings:
    """The other instances of a model in the same server, reached through Linux's abstract sockets: these have no file
    that a process which is killed would leave behind. Only processes of the same user are listened to."""

    def __init__(self, model: str, instance: str, handle: Callable[[str], bool]) -> None:
        """Args:
        handle: does what another instance asks; whether it could. Called in a thread of this object.
        """
        # The instances' processes are children of one server.
        self._prefix = f"autoglm/{os.getppid()}/{model}/"
        self._name = f"{self._prefix}{instance}"
        self._handle = handle
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.bind(f"\0{self._name}")
        self._socket.listen()
        threading.Thread(target=self._work, name="siblings", daemon=True).start()

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)  # which ends the thread
        self._socket.close()

    def ask(self, message: str) -> bool:
        """Ask all of them; whether at least one could do it."""
        return sum(self._ask(name, message) for name in self._others()) > 0

    def _others(self) -> set[str]:
        names = {line.rpartition(" @")[2] for line in SOCKETS.read_text().splitlines()}
        return {name for name in names if name.startswith(self._prefix) and name != self._name}

    def _ask(self, name: str, message: str) -> bool:
        with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as other:
            other.settimeout(SECONDS)
            other.connect(f"\0{name}")
            if _user(other) == os.getuid():
                other.send(message.encode())
                return other.recv(1) == b"1"
        return False

    def _work(self) -> None:
        while True:
            try:
                other, _ = self._socket.accept()
            except OSError:  # closed
                return
            with other:
                try:
                    other.settimeout(SECONDS)
                    if _user(other) == os.getuid():
                        other.send(b"1" if self._handle(other.recv(LONGEST).decode()) else b"0")
                except Exception as error:
                    log.warning("an instance could not be answered: %s", error)


def _user(other: socket.socket) -> int:
    _, uid, _ = CREDENTIALS.unpack(other.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, CREDENTIALS.size))
    return int(uid)
