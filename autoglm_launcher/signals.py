"""SIGINT, SIGTERM and SIGHUP as an exception of the main thread."""

from __future__ import annotations

import signal
from types import FrameType


class Interrupted(BaseException):
    """Somebody asked this program to end. exit_code is what shells expect: 128 + the signal."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


def raise_on_signals() -> None:
    """From now on these signals raise Interrupted; one that was ignored (nohup) stays ignored."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _raise)


def _raise(number: int, frame: FrameType | None) -> None:
    raise Interrupted(number)
