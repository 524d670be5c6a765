"""The launcher's terminal: messages, progress, errors, and signals."""

from __future__ import annotations

import shutil
import signal
import sys
import time
from types import FrameType

QUIET_S = 10.0
ERASE = "\r\x1b[2K"

_moving_line = False


class LauncherError(Exception):
    """One line: the problem and its remedy. The command prints it and exits with 1."""


class Interrupted(BaseException):
    """The program was asked to end. exit_code is the shell's convention: 128 + the signal."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


def raise_on_signals() -> None:
    """Make SIGINT, SIGTERM and SIGHUP raise Interrupted in the main thread; an ignored one (nohup) stays ignored."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _raise)


def say(text: str) -> None:
    """One line on standard output."""
    _leave_moving_line()
    print(f"autoglm: {text}", flush=True)


def complain(text: str) -> None:
    """One line on standard error."""
    _leave_moving_line()
    print(f"autoglm: error: {text}", file=sys.stderr, flush=True)


class Progress:
    """Shows that something long goes on: rewrites one line on a terminal, elsewhere adds a line every 10 s."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._begin = time.monotonic()
        self._said = self._begin
        if sys.stdout.isatty():
            self.show()
        else:
            say(f"{what} ...")

    def show(self, detail: str = "") -> None:
        """detail: what is being done just now."""
        global _moving_line
        now = time.monotonic()
        line = f"autoglm: {self._what} ... {now - self._begin:.0f} s{'; ' + detail if detail else ''}"
        if sys.stdout.isatty():
            print(f"{ERASE}{line[: shutil.get_terminal_size().columns - 1]}", end="", flush=True)
            _moving_line = True
        elif now - self._said >= QUIET_S:
            print(line[:160], flush=True)
            self._said = now

    def done(self, result: str = "done") -> None:
        say(f"{self._what}: {result} ({time.monotonic() - self._begin:.0f} s)")


def _leave_moving_line() -> None:
    global _moving_line
    if _moving_line:
        print(ERASE, end="", flush=True)
        _moving_line = False


def _raise(number: int, frame: FrameType | None) -> None:
    raise Interrupted(number)
