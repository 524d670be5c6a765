"""What the launcher says: few lines, each with its source; one line that moves where a person watches."""

from __future__ import annotations

import shutil
import sys
import time

QUIET_S = 10.0
ERASE = "\r\x1b[2K"

_moving_line = False


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
