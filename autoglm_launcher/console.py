"""The launcher's terminal output (messages, progress, errors) and its signal handling."""

import shutil
import signal
import sys
import time
from types import FrameType

LINE_INTERVAL_S = 10.0
ERASE = "\r\x1b[2K"

_progress_shown = False


class LauncherError(Exception):
    """A problem and its remedy, in one line. The command prints it and exits with 1."""


class Interrupted(BaseException):
    """A signal asked the program to end; str() is the signal's name. exit_code: 128 + its number, as in shells."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


def raise_on_signals() -> None:
    """Let SIGINT, SIGTERM and SIGHUP raise Interrupted in the main thread; an ignored signal (nohup) stays ignored."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _raise)


def say(text: str) -> None:
    """Print one line to standard output."""
    _erase_progress()
    print(f"autoglm: {text}", flush=True)


def complain(text: str) -> None:
    """Print one line to standard error."""
    _erase_progress()
    print(f"autoglm: error: {text}", file=sys.stderr, flush=True)


class Progress:
    """Reports a long operation: rewrites one line on a terminal; elsewhere prints a line every LINE_INTERVAL_S."""

    def __init__(self, task: str) -> None:
        self._task = task
        self._begin = time.monotonic()
        self._last_line = self._begin
        if sys.stdout.isatty():
            self.show()
        else:
            say(f"{task} ...")

    def show(self, detail: str = "") -> None:
        """detail: the current step."""
        global _progress_shown
        now = time.monotonic()
        line = f"autoglm: {self._task} ... {now - self._begin:.0f} s{'; ' + detail if detail else ''}"
        if sys.stdout.isatty():
            print(f"{ERASE}{line[: shutil.get_terminal_size().columns - 1]}", end="", flush=True)
            _progress_shown = True
        elif now - self._last_line >= LINE_INTERVAL_S:
            print(line[:160], flush=True)
            self._last_line = now

    def done(self, result: str = "done") -> None:
        say(f"{self._task}: {result} ({time.monotonic() - self._begin:.0f} s)")


def _erase_progress() -> None:
    global _progress_shown
    if _progress_shown:
        print(ERASE, end="", flush=True)
        _progress_shown = False


def _raise(number: int, frame: FrameType | None) -> None:
    raise Interrupted(number)
