"""Processes and their shared memory: descendants, the tritonserver and its stubs, leftovers of a killed server."""

import os
import signal
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

POLL_S = 0.1  # between checks of a process
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
    """The process's arguments; empty if it has ended or is a zombie."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace").split("\0")[:-1]
    except OSError:
        return []


def is_running(pid: int) -> bool:
    """Whether the process exists and is not a zombie."""
    return _state_and_parent(pid)[0] not in ("", "Z", "X")


def descendants(root: int) -> list[int]:
    """Running descendants of a process, parents first."""
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
    """The tritonserver among a process's descendants, its stubs, and other descendants."""
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
    """Send a signal, unless the process has ended."""
    with suppress(ProcessLookupError):
        os.kill(pid, signal_number)


def kill_group(group: int, patience_s: float = 2.0) -> None:
    """Kill every process of a group and wait until they have ended, at most patience_s for unreaped zombies."""
    deadline = time.monotonic() + patience_s
    with suppress(ProcessLookupError):
        while time.monotonic() < deadline:
            os.killpg(group, signal.SIGKILL)
            time.sleep(0.01)


def region_prefix(owner: int) -> str:
    """The prefix of the shared memory regions of the server whose reaper is the process `owner`.

    It includes the pid namespace: containers that share /dev/shm may use the same pids.
    """
    namespace = os.readlink("/proc/self/ns/pid").strip("pid:[]")
    return f"autoglm_{namespace}_{owner}_"


def remove_regions(prefix: str) -> None:
    """Remove a server's regions from /dev/shm."""
    for path in SHARED_MEMORY.glob(f"{prefix}*"):
        path.unlink(missing_ok=True)


def remove_stale() -> None:
    """Kill the stubs and remove the shared memory of this user's servers whose reaper was killed."""
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
        # The process name, in brackets, may contain any character: split after the last bracket.
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        return fields[0], int(fields[1])
    except (OSError, IndexError, ValueError):
        return "", 0
