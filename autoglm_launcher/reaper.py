"""The process between the launcher and a command it manages: no process and no shared memory outlives them.

It runs the command as its child, in a separate process group, and reaps all descendants. It ends the command on
SIGTERM, and when the launcher has ended (its standard input closes, even after kill -9). Once the command has ended,
it kills every remaining descendant and removes the shared memory.

    python -m autoglm_launcher.reaper GRACE_SECONDS COMMAND...

"{regions}" in the command is replaced by the prefix of the shared memory regions.
"""

import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from types import FrameType

from autoglm_launcher.processes import POLL_S, descendants, kill, region_prefix, remove_regions

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
STUBS_EXIT_S = 2.0

_libc = ctypes.CDLL(None, use_errno=True)


class Reaper:
    """Runs one command until it ends, a signal arrives or the launcher has ended."""

    def __init__(self, command: list[str], grace_s: float) -> None:
        self._regions = region_prefix(os.getpid())
        self._command = [part.replace("{regions}", self._regions) for part in command]
        self._grace_s = grace_s
        self._stopping = False

    def run(self) -> int:
        """Returns the command's exit code; 128 + N if signal N ended it."""
        # A separate group, which the terminal's Ctrl-C does not reach, but the launcher's session: Linux divides the
        # cores among sessions first (autogroup), and in 6.18 a busy session can stall others for seconds.
        os.setpgid(0, 0)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._on_signal)
        _libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        child = subprocess.Popen(self._command, stdin=subprocess.DEVNULL, preexec_fn=_die_with_parent)
        try:
            while child.poll() is None and not self._stopping and not _launcher_has_ended():
                pass
            if child.poll() is None:
                child.terminate()
                _wait(lambda: child.poll() is not None, self._grace_s)
        finally:
            self._sweep(child)
        return child.returncode if child.returncode >= 0 else 128 - child.returncode

    def _sweep(self, child: subprocess.Popen[bytes]) -> None:
        """Leave no process and no shared memory."""
        if child.poll() is not None:
            # Stubs exit by themselves once their server has ended.
            _wait(lambda: not descendants(os.getpid()), STUBS_EXIT_S)
        while left := descendants(os.getpid()):
            for pid in left:
                kill(pid)
            time.sleep(POLL_S / 2)
        child.wait()
        remove_regions(self._regions)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._stopping = True


def _die_with_parent() -> None:
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _launcher_has_ended() -> bool:
    """Whether the standard input closes within POLL_S."""
    readable, _, _ = select.select([0], [], [], POLL_S)
    return bool(readable) and os.read(0, 1) == b""


def _wait(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(POLL_S / 2)


if __name__ == "__main__":
    sys.exit(Reaper(sys.argv[2:], float(sys.argv[1])).run())
