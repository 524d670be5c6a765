"""The process between the launcher and the tritonserver: whatever dies, nothing is left behind.

It runs the server as its child in a process group of its own and is the reaper of all that descends from it. It ends
the server when it is told to (SIGTERM), and when the launcher is gone (its standard input closes, also after kill -9).
When the server has ended, by itself or not, it kills every process that is left and removes the shared memory.

    python -m autoglm_launcher.reaper GRACE_SECONDS COMMAND...

"{regions}" in the command becomes the prefix of the shared memory regions.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from types import FrameType

from autoglm_launcher.processes import descendants, kill, region_prefix, remove_regions

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
POLL_S = 0.1
LAST_STEPS_S = 2.0

_libc = ctypes.CDLL(None, use_errno=True)


class Supervisor:
    """Runs one command until it ends or has to."""

    def __init__(self, command: list[str], grace_s: float) -> None:
        self._regions = region_prefix(os.getpid())
        self._command = [part.replace("{regions}", self._regions) for part in command]
        self._grace_s = grace_s
        self._told_to_stop = False

    def run(self) -> int:
        """Run to the end; returns the command's exit code, 128 + N when signal N ended it."""
        # Out of reach of the terminal's Ctrl+C, but in the launcher's session: Linux shares the cores among sessions
        # first (autogroup), and 6.18 can let one that is always busy, as a server on the CPU, stop others for seconds.
        os.setpgid(0, 0)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._on_signal)
        _libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        server = subprocess.Popen(self._command, stdin=subprocess.DEVNULL, preexec_fn=_die_with_parent)
        try:
            while server.poll() is None and not self._told_to_stop and not _launcher_is_gone():
                pass
            if server.poll() is None:
                server.terminate()
                _wait(lambda: server.poll() is not None, self._grace_s)
        finally:
            self._sweep(server)
        return server.returncode if server.returncode >= 0 else 128 - server.returncode

    def _sweep(self, server: subprocess.Popen[bytes]) -> None:
        """Leave no process and no shared memory."""
        if server.poll() is not None:
            # Stubs see that their server ended and leave by themselves.
            _wait(lambda: not descendants(os.getpid()), LAST_STEPS_S)
        while left := descendants(os.getpid()):
            for pid in left:
                kill(pid)
            time.sleep(POLL_S / 2)
        server.wait()
        remove_regions(self._regions)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._told_to_stop = True


def _die_with_parent() -> None:
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _launcher_is_gone() -> bool:
    """Wait a moment for the standard input to close."""
    readable, _, _ = select.select([0], [], [], POLL_S)
    return bool(readable) and os.read(0, 1) == b""


def _wait(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(POLL_S / 2)


if __name__ == "__main__":
    sys.exit(Supervisor(sys.argv[2:], float(sys.argv[1])).run())
