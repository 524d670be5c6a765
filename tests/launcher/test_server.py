"""TritonServer with the real tritonserver and a repository of one small model."""

import http.client
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from autoglm_launcher import ROOT
from autoglm_launcher.console import LauncherError
from autoglm_launcher.processes import command_line, descendants, is_running
from autoglm_launcher.server import MAX_STARTS, TritonServer

pytestmark = pytest.mark.tritonserver

SHARED_MEMORY = Path("/dev/shm")


@pytest.fixture
def server(repository: Path, tmp_path: Path) -> TritonServer:
    return TritonServer(repository=repository, log_path=tmp_path / "server.log", grace_s=3)


def regions() -> set[str]:
    """The shared memory of this process's servers and of dead ones; other servers on this machine come and go."""
    ours = descendants(os.getpid())
    owners = {path.name: int(path.name.split("_")[2]) for path in SHARED_MEMORY.glob("autoglm_*")}
    return {name for name, owner in owners.items() if owner in ours or not is_running(owner)}


def wait(condition: Callable[[], bool], seconds: float = 10) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


def reaper_of(server: TritonServer) -> int:
    reapers = [pid for pid in descendants(os.getpid()) if "autoglm_launcher.reaper" in command_line(pid)]
    (pid,) = [pid for pid in reapers if server.processes()[0].pid in descendants(pid)]
    return pid


def test_starts_serves_and_leaves_nothing(server: TritonServer) -> None:
    before = regions()
    with server:
        pids = [process.pid for process in server.processes()]
        assert [process.kind for process in server.processes()].count("server") == 1
        stubs = sorted(process.instance for process in server.processes() if process.kind == "stub")
        assert stubs == ["small_0_0", "small_0_1"]
        assert server.loaded_models() == ["small"]
        assert len(regions() - before) == 2
        assert get(server.http_address, "/v2/models/small/ready") == 200
        assert get(f"127.0.0.1:{server.ports.metrics}", "/metrics") == 200
    assert not [pid for pid in pids if is_running(pid)]
    assert regions() <= before


def test_apis_that_change_the_server_are_restricted(server: TritonServer) -> None:
    with server:
        assert get(server.http_address, "/v2/repository/index", "POST") == 403
        assert get(server.http_address, "/v2/systemsharedmemory/status") == 403
        assert get(server.http_address, "/v2/logging") == 403
        assert get(server.http_address, "/v2/models/stats") == 200
        server.stop(now=True)


@pytest.mark.parametrize("victim", ["stub", "server", "reaper"])
def test_nothing_outlives_a_kill_9(server: TritonServer, victim: str) -> None:
    before = regions()
    server.start()
    try:
        server.wait_ready(60)
        processes = server.processes()
        for process in processes:
            # Hung stubs do not exit by themselves: they must be killed.
            if process.kind == "stub":
                os.kill(process.pid, signal.SIGSTOP)
        victims = {"reaper": reaper_of(server)} | {process.kind: process.pid for process in processes}
        os.kill(victims[victim], signal.SIGKILL)
        if victim != "stub":
            assert wait(lambda: not server.is_alive())
            assert "SIGKILL" in server.explain()
    finally:
        server.stop(now=True)
    assert not [process for process in processes if is_running(process.pid)]
    assert regions() <= before


def test_the_server_does_not_outlive_a_killed_launcher(repository: Path, tmp_path: Path) -> None:
    before = regions()
    script = (
        "import sys, time; from pathlib import Path; from autoglm_launcher.server import TritonServer\n"
        f"repository, log = Path({str(repository)!r}), Path({str(tmp_path / 'log')!r})\n"
        "server = TritonServer(repository=repository, log_path=log, grace_s=1)\n"
        "server.start(); server.wait_ready(60)\n"
        "print(*[process.pid for process in server.processes()], flush=True); time.sleep(100)\n"
    )
    launcher = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert launcher.stdout
    pids = [int(pid) for pid in launcher.stdout.readline().split()]
    launcher.kill()
    launcher.wait()
    launcher.stdout.close()
    assert len(pids) == 3
    assert wait(lambda: not any(map(is_running, pids)))
    assert wait(lambda: regions() <= before)


def test_the_next_start_kills_the_stubs_of_a_lost_server(
    server: TritonServer, repository: Path, tmp_path: Path
) -> None:
    # Linux ends stopped processes in the orphaned group of a killed reaper, but not in other sessions.
    model = repository / "small" / "1" / "model.py"
    model.write_text("import os\nos.setsid()\n" + model.read_text())
    before = regions()
    server.start()
    server.wait_ready(60)
    stubs = [process.pid for process in server.processes() if process.kind == "stub"]
    (triton,) = (process.pid for process in server.processes() if process.kind == "server")
    for pid in stubs:  # hung: they do not exit when their server ends
        os.kill(pid, signal.SIGSTOP)
    os.kill(reaper_of(server), signal.SIGKILL)
    assert wait(lambda: not server.is_alive() and not is_running(triton))
    assert len(stubs) == 2 and all(map(is_running, stubs))
    with TritonServer(repository=repository, log_path=tmp_path / "second.log") as second:
        assert not any(map(is_running, stubs))
        assert len(regions() - before) == 2
        second.stop(now=True)


def test_a_model_that_fails_to_load_is_reported_in_one_line(server: TritonServer) -> None:
    (server.repository / "small" / "1" / "model.py").write_text("raise ValueError('no weights in /models')")
    server.start()
    try:
        with pytest.raises(LauncherError) as error:
            server.wait_ready(60)
    finally:
        server.stop(now=True)
    assert str(error.value) == (
        f"the server did not start: model small: Internal: ValueError: no weights in /models (log: {server.log_path})"
    )


@pytest.mark.parametrize("crashes", [2, 3])
def test_a_server_that_crashes_while_loading_is_restarted(
    server: TritonServer, crashes: int, capfd: pytest.CaptureFixture[str]
) -> None:
    model = server.repository / "small" / "1" / "model.py"
    # Once for each server; a stub that outlives its server has another parent.
    crash = f"""
import fcntl, os, pathlib, signal, time
parent = os.getppid()
assert pathlib.Path(f"/proc/{{parent}}/comm").read_text().strip() == "tritonserver"
with pathlib.Path({str(server.repository.parent / "starts")!r}).open("a+") as starts:
    fcntl.flock(starts, fcntl.LOCK_EX)
    starts.seek(0)
    servers = {{*starts.read().split(), str(parent)}}
    starts.write(f"{{parent}} ")
if len(servers) <= {crashes}:
    os.kill(parent, signal.SIGABRT)
    time.sleep(60)
"""
    model.write_text(crash + model.read_text())
    before = regions()
    server.start()
    try:
        if crashes < MAX_STARTS:
            server.wait_ready(60)
            assert get(server.http_address, "/v2/models/small/ready") == 200
        else:
            with pytest.raises(LauncherError, match="the server did not start: killed by SIGABRT"):
                server.wait_ready(60)
    finally:
        server.stop(now=True)
    assert capfd.readouterr().err.count("killed by SIGABRT") == 2
    assert regions() <= before


def test_a_taken_port_is_reported_before_anything_starts(server: TritonServer, repository: Path) -> None:
    server.start()
    try:
        server.wait_ready(60)
        second = TritonServer(repository=repository, ports=server.ports)
        with pytest.raises(LauncherError, match=f"http port {server.ports.http} cannot be used"):
            second.start()
    finally:
        server.stop(now=True)


def get(address: str, path: str, method: str = "GET") -> int:
    connection = http.client.HTTPConnection(address, timeout=10)
    try:
        connection.request(method, path, headers={"Content-Length": "0"})
        return connection.getresponse().status
    finally:
        connection.close()
