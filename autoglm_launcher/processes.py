"""Reading /proc: who descends from whom, and which processes are a tritonserver and its stubs."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

STUB_NAME = "triton_python_backend_stub"
SHARED_MEMORY = Path("/dev/shm")


@dataclass(frozen=True)
class ServerProcess:
    """One process of a running server.

    kind: "server", "stub" or "other". instance: a stub's model instance, such as "vit_encoder_0_0".
    """

    pid: int
    kind: str
    instance: str = ""


def command_line(pid: int) -> list[str]:
    """The process's arguments; empty when it is gone or a zombie."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace").split("\0")[:-1]
    except OSError:
        return []


def is_running(pid: int) -> bool:
    """Whether the process exists and is not a zombie."""
    return _state_and_parent(pid)[0] not in ("", "Z", "X")


def descendants(root: int) -> list[int]:
    """Running processes below root, parents first."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            state, parent = _state_and_parent(int(entry))
            if state not in ("", "Z", "X"):
                children.setdefault(parent, []).append(int(entry))
    found: list[int] = []
    level = [root]
    while level:
        level = [child for pid in level for child in children.get(pid, [])]
        found += level
    return found


def server_processes(root: int) -> list[ServerProcess]:
    """The tritonserver below root, its stubs, and what else they started."""
    result = []
    for pid in descendants(root):
        command = command_line(pid)
        name = Path(command[0]).name if command else ""
        if name == STUB_NAME:
            # argv: stub, model.py, region, size, growth, parent, backend, handle, instance, runtime directory
            result.append(ServerProcess(pid, "stub", command[8] if len(command) > 8 else ""))
        elif name:
            result.append(ServerProcess(pid, "server" if name == "tritonserver" else "other"))
    return result


def kill(pid: int, signal_number: int = signal.SIGKILL) -> None:
    """Send a signal; a process that is gone is no error."""
    with suppress(ProcessLookupError):
        os.kill(pid, signal_number)


def kill_group(group: int, patience_s: float = 2.0) -> None:
    """Kill every process of a group and wait until they are gone; zombies that nobody reaps are given up."""
    deadline = time.monotonic() + patience_s
    with suppress(ProcessLookupError):
        while time.monotonic() < deadline:
            os.killpg(group, signal.SIGKILL)
            time.sleep(0.01)


def region_prefix(owner: int) -> str:
    """The prefix of the shared memory of the server that process owner supervises.

    It names the pid namespace too: containers may share /dev/shm and count their pids alike.
    """
    namespace = os.readlink("/proc/self/ns/pid").strip("pid:[]")
    return f"autoglm_{namespace}_{owner}_"


def remove_regions(prefix: str) -> None:
    """Remove what a killed server left in /dev/shm."""
    for path in SHARED_MEMORY.glob(f"{prefix}*"):
        path.unlink(missing_ok=True)


def remove_stale() -> None:
    """Kill hung stubs and remove shared memory of our servers whose supervisor is gone."""
    for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
        command = command_line(pid)
        if len(command) > 2 and Path(command[0]).name == STUB_NAME and _is_stale(command[2]):
            with suppress(PermissionError):
                kill(pid)
    for path in SHARED_MEMORY.iterdir():
        if _is_stale(path.name) and path.stat().st_uid == os.getuid():
            path.unlink(missing_ok=True)


def _is_stale(region: str) -> bool:
    prefix = region_prefix(0).removesuffix("0_")
    owner = region.removeprefix(prefix).split("_")[0] if region.startswith(prefix) else ""
    return owner.isdigit() and not is_running(int(owner))


def _state_and_parent(pid: int) -> tuple[str, int]:
    try:
        # The name, in brackets, may hold anything; the fields after its last bracket do not.
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        return fields[0], int(fields[1])
    except (OSError, IndexError, ValueError):
        return "", 0
