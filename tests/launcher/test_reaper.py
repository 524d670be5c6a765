import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from autoglm_launcher import processes
from autoglm_launcher.processes import descendants, is_running, region_prefix, remove_stale

ROOT = Path(__file__).resolve().parents[2]


def supervise(command: list[str], grace_s: float = 1.0) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        [sys.executable, "-m", "autoglm_launcher.reaper", str(grace_s), *command],
        cwd=ROOT,
        stdin=subprocess.PIPE,
    )


def wait_for_descendants(pid: int, count: int) -> list[int]:
    deadline = time.monotonic() + 10
    while len(found := descendants(pid)) != count and time.monotonic() < deadline:
        time.sleep(0.02)
    assert len(found) == count
    return found


def test_passes_the_exit_code_on() -> None:
    assert supervise(["sh", "-c", "exit 7"]).wait(10) == 7
    assert supervise(["sh", "-c", "kill -9 $$"]).wait(10) == 128 + 9


def test_a_terminal_reaches_only_the_launcher() -> None:
    supervisor = supervise(["sleep", "100"])
    (child,) = wait_for_descendants(supervisor.pid, 1)
    assert os.getpgid(child) == os.getpgid(supervisor.pid) == supervisor.pid
    assert os.getsid(child) == os.getsid(0)
    supervisor.terminate()
    supervisor.wait(10)


def test_ends_its_command_when_told() -> None:
    supervisor = supervise(["sleep", "100"])
    (child,) = wait_for_descendants(supervisor.pid, 1)
    supervisor.terminate()
    assert supervisor.wait(10) == 128 + signal.SIGTERM
    assert not is_running(child)


def test_ends_its_command_when_the_launcher_is_gone() -> None:
    supervisor = supervise(["sleep", "100"])
    (child,) = wait_for_descendants(supervisor.pid, 1)
    assert supervisor.stdin
    supervisor.stdin.close()
    supervisor.wait(10)
    assert not is_running(child)


def test_kills_what_does_not_listen_also_in_another_session() -> None:
    deaf = "trap '' TERM; setsid sh -c \"trap '' TERM; while :; do sleep 1; done\" & while :; do sleep 1; done"
    supervisor = supervise(["sh", "-c", deaf], grace_s=0.3)
    left = wait_for_descendants(supervisor.pid, 4)
    supervisor.terminate()
    supervisor.wait(10)
    assert not [pid for pid in left if is_running(pid)]


def test_its_command_does_not_outlive_it() -> None:
    supervisor = supervise(["sleep", "100"])
    (child,) = wait_for_descendants(supervisor.pid, 1)
    supervisor.kill()
    supervisor.wait(10)
    deadline = time.monotonic() + 5
    while is_running(child) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not is_running(child)


def test_removes_the_shared_memory_of_its_command() -> None:
    supervisor = supervise(["sh", "-c", "echo x > /dev/shm/{regions}test; ls /dev/shm | grep -q ^{regions} && exit 5"])
    assert supervisor.wait(10) == 5
    assert not list(Path("/dev/shm").glob(f"{region_prefix(supervisor.pid)}*"))


def test_only_regions_without_an_owner_are_stale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "SHARED_MEMORY", tmp_path)
    ended = subprocess.Popen(["true"])
    ended.wait()
    stale = tmp_path / f"{region_prefix(ended.pid)}abc"
    kept = [
        tmp_path / f"{region_prefix(os.getpid())}abc",
        tmp_path / "autoglm_1_2_of_another_pid_namespace",
        tmp_path / "x",
    ]
    for path in [stale, *kept]:
        path.touch()
    remove_stale()
    assert sorted(tmp_path.iterdir()) == sorted(kept)
