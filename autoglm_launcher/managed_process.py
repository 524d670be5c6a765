"""A command with a supervisor of its own: started, looked after and stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path

from autoglm_launcher import ROOT
from autoglm_launcher.processes import (
    ServerProcess,
    kill,
    kill_group,
    region_prefix,
    remove_regions,
    server_processes,
)


class Supervised(ABC):
    """One command, run from the repository's root, which leaves nothing behind whatever dies (see supervisor.py).

    log_path: the command's output; None: this process's own. grace_s: what a stop gives the command to end by itself.
    """

    def __init__(self, environment: Mapping[str, str], log_path: Path | None, grace_s: float) -> None:
        self.log_path = log_path
        self._environment = {**os.environ, **environment}
        self._grace_s = grace_s
        self._log_start = 0
        self._supervisor: subprocess.Popen[bytes] | None = None

    @abstractmethod
    def command(self) -> list[str]:
        """The command line; "{regions}" stands for the prefix that its supervisor gives to shared memory."""

    def start(self) -> None:
        command = [sys.executable, "-m", "autoglm_launcher.reaper", str(self._grace_s), *self.command()]
        log = self.log_path.open("ab") if self.log_path else None
        try:
            self._log_start = log.tell() if log else 0
            self._supervisor = subprocess.Popen(
                command,
                cwd=ROOT,
                env=self._environment,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT if log else None,
            )
        finally:
            if log:
                log.close()

    def is_alive(self) -> bool:
        """Whether the supervisor runs; it ends with its command."""
        return self._supervisor is not None and self._supervisor.poll() is None

    @property
    def ended_by(self) -> signal.Signals | None:
        """The signal that has ended the command, if one has."""
        code = self._supervisor.poll() if self._supervisor else None
        if code is None or 0 <= code <= 128:
            return None
        return signal.Signals(-code if code < 0 else code - 128)

    def processes(self) -> list[ServerProcess]:
        """The command's process and what it started, as they run now."""
        return server_processes(self._supervisor.pid) if self._supervisor else []

    def terminate(self) -> None:
        """Tell it to end; stop() waits for that."""
        if self._supervisor:
            self._supervisor.terminate()

    def stop(self, *, now: bool = False) -> None:
        """End everything that was started; what it has begun gets grace_s seconds, or none."""
        supervisor, self._supervisor = self._supervisor, None
        if supervisor is None:
            return
        try:
            if now:
                for process in server_processes(supervisor.pid):
                    kill(process.pid)
            supervisor.terminate()
            supervisor.wait(self._grace_s + 5)
        except subprocess.TimeoutExpired:
            pass
        finally:
            # The supervisor does this too; here it is for the case that somebody killed the supervisor.
            kill_group(supervisor.pid)
            supervisor.kill()  # as long as it has not made its group
            supervisor.wait()
            if supervisor.stdin:
                supervisor.stdin.close()
            remove_regions(region_prefix(supervisor.pid))

    def log_text(self) -> str:
        """What the command has written since start(); empty when its output is not a file."""
        if self.log_path is None or not self.log_path.exists():
            return ""
        with self.log_path.open("rb") as log:
            log.seek(self._log_start)
            return log.read().decode(errors="replace")

    def explain(self) -> str:
        """How the command ended, or the log's most telling line; and where to read the rest."""
        where = f"log: {self.log_path}" if self.log_path else "see its output"
        if self.ended_by is not None:
            return f"{self.ended_by.name} ended it ({where})"
        return f"{self.telling_line(self.log_text())} ({where})"

    def telling_line(self, log: str) -> str:
        """The line of a log that says what went wrong: here the last one."""
        lines = [line.strip() for line in log.splitlines() if line.strip()]
        return lines[-1][:400] if lines else "it wrote nothing"
