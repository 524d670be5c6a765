"""Messages between the instances of one model: Triton routes requests to any instance; each is a process."""

import logging
import os
import socket
import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

log = logging.getLogger(__name__)

UNIX_SOCKETS = Path("/proc/net/unix")
TIMEOUT_S = 0.1  # for an instance to answer
MAX_BYTES = 65536  # of a message
CREDENTIALS = struct.Struct("3i")  # pid, uid, gid


class InstanceIPC:
    """The other instances of a model in the same server, reached through Linux's abstract sockets.

    Abstract sockets have no file that a killed process would leave behind. Only peers of the same user are accepted.
    """

    def __init__(self, model: str, instance: str, handle: Callable[[str], bool]) -> None:
        """
        Args:
            handle: handles a message of another instance, in a thread of this object; returns whether it succeeded.
        """
        # The instances' processes are children of one server.
        self._prefix = f"autoglm/{os.getppid()}/{model}/"
        self._name = f"{self._prefix}{instance}"
        self._handle = handle
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.bind(f"\0{self._name}")
        self._socket.listen()
        self._thread = threading.Thread(target=self._run, name="instance-ipc", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)  # ends the thread
        self._thread.join()  # its accept() would keep the name in use
        self._socket.close()

    def broadcast(self, message: str) -> bool:
        """Send a message to all other instances; returns whether at least one handled it."""
        return sum(self._send(name, message) for name in self._others()) > 0

    def _others(self) -> set[str]:
        names = {line.rpartition(" @")[2] for line in UNIX_SOCKETS.read_text().splitlines()}
        return {name for name in names if name.startswith(self._prefix) and name != self._name}

    def _send(self, name: str, message: str) -> bool:
        with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as peer:
            peer.settimeout(TIMEOUT_S)
            peer.connect(f"\0{name}")
            if _user_id(peer) == os.getuid():
                peer.send(message.encode())
                return peer.recv(1) == b"1"
        return False

    def _run(self) -> None:
        while True:
            try:
                peer, _ = self._socket.accept()
            except OSError:  # closed
                return
            with peer:
                try:
                    peer.settimeout(TIMEOUT_S)
                    if _user_id(peer) == os.getuid():
                        peer.send(b"1" if self._handle(peer.recv(MAX_BYTES).decode()) else b"0")
                except Exception as error:
                    log.warning("a message of another instance could not be handled: %s", error)


def _user_id(peer: socket.socket) -> int:
    _, uid, _ = CREDENTIALS.unpack(peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, CREDENTIALS.size))
    return int(uid)
