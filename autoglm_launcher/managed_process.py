"""A command that the launcher starts, waits for and stops."""

import os
import signal
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path

from autoglm_launcher import ROOT
from autoglm_launcher.console import LauncherError
from autoglm_launcher.processes import (
    POLL_S,
    ServerProcess,
    kill,
    kill_group,
    region_prefix,
    remove_regions,
    server_processes,
)


class ManagedProcess(ABC):
    """A command, run from the repository's root under a reaper, so that none of its processes outlives it (reaper.py).

    log_path: the file for its output; None: this process's output. grace_s: seconds that stop() gives it to end.
    """

    name: str  # in messages

    def __init__(self, environment: Mapping[str, str], log_path: Path | None, grace_s: float) -> None:
        self.environment = {**os.environ, **environment}
        self.log_path = log_path
        self._grace_s = grace_s
        self._log_start = 0
        self._reaper: subprocess.Popen[bytes] | None = None

    @abstractmethod
    def command(self) -> list[str]:
        """The command line; the reaper replaces "{regions}" with its prefix of shared memory regions."""

    def start(self) -> None:
        command = [sys.executable, "-m", "autoglm_launcher.reaper", str(self._grace_s), *self.command()]
        log = self.log_path.open("ab") if self.log_path else None
        try:
            self._log_start = log.tell() if log else 0
            self._reaper = subprocess.Popen(
                command,
                cwd=ROOT,
                env=self.environment,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT if log else None,
            )
        finally:
            if log:
                log.close()

    def wait_until(self, state: str, pending: Callable[[], str | None], timeout_s: float) -> None:
        """Poll until pending() is None; until then it returns why the process is not in this state, if that is known.

        Raises LauncherError when the process ends first, or on timeout.
        """
        deadline = time.monotonic() + timeout_s
        while (reason := pending()) is not None:
            if not self.is_alive():
                raise LauncherError(f"{self.name} did not start: {self.explain()}")
            if time.monotonic() > deadline:
                raise LauncherError(f"{self.name} is not {state} after {timeout_s:.0f} s: {reason or self.explain()}")
            time.sleep(POLL_S)

    def is_alive(self) -> bool:
        """Whether the reaper runs; it ends with its command."""
        return self._reaper is not None and self._reaper.poll() is None

    def failure(self) -> str | None:
        """Why the process must be restarted; None while it runs."""
        return None if self.is_alive() else f"{self.name} ended: {self.explain()}"

    @property
    def ended_by(self) -> signal.Signals | None:
        """The signal that ended the command, if any."""
        code = self._reaper.poll() if self._reaper else None
        if code is None or 0 <= code <= 128:
            return None
        return signal.Signals(-code if code < 0 else code - 128)

    def processes(self) -> list[ServerProcess]:
        """The running processes of the command: its own and their descendants."""
        return server_processes(self._reaper.pid) if self._reaper else []

    def terminate(self) -> None:
        """Ask it to end, without waiting: stop() waits."""
        if self._reaper:
            self._reaper.terminate()

    def stop(self, *, now: bool = False) -> None:
        """End every process, after at most grace_s seconds for requests in progress; immediately if `now`."""
        reaper, self._reaper = self._reaper, None
        if reaper is None:
            return
        try:
            if now:
                for process in server_processes(reaper.pid):
                    kill(process.pid)
            reaper.terminate()
            reaper.wait(self._grace_s + 5)
        except subprocess.TimeoutExpired:
            pass
        finally:
            # The reaper does the same, unless it was killed.
            kill_group(reaper.pid)
            reaper.kill()  # in case it has not created its group yet
            reaper.wait()
            if reaper.stdin:
                reaper.stdin.close()
            remove_regions(region_prefix(reaper.pid))

    def log_text(self) -> str:
        """The command's output since start(); empty when it does not go to a file."""
        if self.log_path is None or not self.log_path.exists():
            return ""
        with self.log_path.open("rb") as log:
            log.seek(self._log_start)
            return log.read().decode(errors="replace")

    def explain(self) -> str:
        """The signal that ended the command, or the most telling line of its log; and where the log is."""
        where = f"log: {self.log_path}" if self.log_path else "see its output"
        if self.ended_by is not None:
            return f"killed by {self.ended_by.name} ({where})"
        return f"{self.telling_line(self.log_text())} ({where})"

    def telling_line(self, log: str) -> str:
        """The line of a log that explains a failure: the last one."""
        lines = [line.strip() for line in log.splitlines() if line.strip()]
        return lines[-1][:400] if lines else "no output"
