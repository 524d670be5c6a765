"""Messages and progress on a terminal and off it, and signals."""

import io
import os
import signal
import sys
from collections.abc import Iterator

import pytest

from autoglm_launcher import console
from autoglm_launcher.console import ERASE, LINE_INTERVAL_S, Interrupted, Progress, complain, raise_on_signals, say


class Clock:
    now = 100.0

    def monotonic(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(console, "time", clock)
    return clock


def open_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """A terminal of 40 columns as standard output and standard error."""
    terminal = Terminal()
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(sys, "stderr", terminal)
    return terminal


@pytest.fixture
def handlers() -> Iterator[None]:
    """Restores the handlers of the signals that the launcher handles."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


def test_messages_go_to_standard_output_and_errors_to_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    say("serving")
    complain("no GPU 1")
    assert capsys.readouterr() == ("autoglm: serving\n", "autoglm: error: no GPU 1\n")


def test_progress_off_a_terminal_prints_a_line_every_interval(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress("loading")
    for _ in range(int(LINE_INTERVAL_S) * 2):
        clock.now += 1
        progress.show("a" * 200)
    progress.done("loaded")
    first, *lines, last = capsys.readouterr().out.splitlines()
    assert first == "autoglm: loading ..."
    assert [line[:35] for line in lines] == [f"autoglm: loading ... {seconds} s; aaaaaaaa" for seconds in (10, 20)]
    assert {len(line) for line in lines} == {160}
    assert last == "autoglm: loading: loaded (20 s)"


def test_progress_on_a_terminal_rewrites_one_line_within_its_width(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = open_terminal(monkeypatch)
    progress = Progress("loading")
    clock.now += 1
    progress.show("a" * 200)
    assert terminal.getvalue() == f"{ERASE}autoglm: loading ... 0 s" + f"{ERASE}autoglm: loading ... 1 s; ".ljust(
        44, "a"
    )
    progress.done()
    assert terminal.getvalue().endswith(f"{ERASE}autoglm: loading: done (1 s)\n")


def test_a_message_erases_the_progress_line_once(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = open_terminal(monkeypatch)
    Progress("loading")
    complain("no GPU 1")
    say("bye")
    assert terminal.getvalue() == f"{ERASE}autoglm: loading ... 0 s{ERASE}autoglm: error: no GPU 1\nautoglm: bye\n"


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_signals_raise_interrupted_with_the_exit_code_of_shells(number: signal.Signals, exit_code: int) -> None:
    signal.signal(number, signal.SIG_DFL)
    raise_on_signals()
    with pytest.raises(Interrupted, match=f"^{number.name}$") as interrupted:
        os.kill(os.getpid(), number)
    assert interrupted.value.exit_code == exit_code
    assert not isinstance(interrupted.value, Exception), "no handler of errors may catch it"


@pytest.mark.usefixtures("handlers")
def test_a_signal_that_nohup_ignores_stays_ignored() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    raise_on_signals()
    os.kill(os.getpid(), signal.SIGHUP)
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
