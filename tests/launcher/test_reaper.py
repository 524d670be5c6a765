import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from autoglm_launcher import ROOT, processes
from autoglm_launcher.processes import descendants, is_running, region_prefix, remove_stale


def reap(command: list[str], grace_s: float = 1.0) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        [sys.executable, "-m", "autoglm_launcher.reaper", str(grace_s), *command], cwd=ROOT, stdin=subprocess.PIPE
    )


def wait_for_descendants(pid: int, count: int) -> list[int]:
    deadline = time.monotonic() + 10
    while len(found := descendants(pid)) != count and time.monotonic() < deadline:
        time.sleep(0.02)
    assert len(found) == count
    return found


def test_returns_the_exit_code_of_the_command() -> None:
    assert reap(["sh", "-c", "exit 7"]).wait(10) == 7
    assert reap(["sh", "-c", "kill -9 $$"]).wait(10) == 128 + 9


def test_the_terminal_signals_only_the_launcher() -> None:
    reaper = reap(["sleep", "100"])
    (child,) = wait_for_descendants(reaper.pid, 1)
    assert os.getpgid(child) == os.getpgid(reaper.pid) == reaper.pid
    assert os.getsid(child) == os.getsid(0)
    reaper.terminate()
    reaper.wait(10)


def test_sigterm_ends_the_command() -> None:
    reaper = reap(["sleep", "100"])
    (child,) = wait_for_descendants(reaper.pid, 1)
    reaper.terminate()
    assert reaper.wait(10) == 128 + signal.SIGTERM
    assert not is_running(child)


def test_the_end_of_the_launcher_ends_the_command() -> None:
    reaper = reap(["sleep", "100"])
    (child,) = wait_for_descendants(reaper.pid, 1)
    assert reaper.stdin
    reaper.stdin.close()
    reaper.wait(10)
    assert not is_running(child)


def test_processes_that_ignore_sigterm_are_killed_even_in_another_session() -> None:
    stubborn = "trap '' TERM; setsid sh -c \"trap '' TERM; while :; do sleep 1; done\" & while :; do sleep 1; done"
    reaper = reap(["sh", "-c", stubborn], grace_s=0.3)
    started = wait_for_descendants(reaper.pid, 4)
    reaper.terminate()
    reaper.wait(10)
    assert not [pid for pid in started if is_running(pid)]


def test_the_command_does_not_outlive_a_killed_reaper() -> None:
    reaper = reap(["sleep", "100"])
    (child,) = wait_for_descendants(reaper.pid, 1)
    reaper.kill()
    reaper.wait(10)
    deadline = time.monotonic() + 5
    while is_running(child) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not is_running(child)


def test_the_shared_memory_of_the_command_is_removed() -> None:
    reaper = reap(["sh", "-c", "echo x > /dev/shm/{regions}test; ls /dev/shm | grep -q ^{regions} && exit 5"])
    assert reaper.wait(10) == 5
    assert not list(Path("/dev/shm").glob(f"{region_prefix(reaper.pid)}*"))


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
