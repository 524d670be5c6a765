"""GatewayProcess: a real `python -m gateway`, without a server."""

import os
import signal
import socket
import time
from pathlib import Path

import pytest

from autoglm_launcher import gateway as module
from autoglm_launcher import restart
from autoglm_launcher.console import LauncherError
from autoglm_launcher.gateway import GatewayProcess, fault_of
from autoglm_launcher.ports import free_ports
from autoglm_launcher.processes import is_running
from autoglm_launcher.restart import Restarter


def make_gateway(directory: Path, environment: dict[str, str] | None = None) -> GatewayProcess:
    triton, port = free_ports(2)
    return GatewayProcess(
        triton=f"127.0.0.1:{triton}",
        host="127.0.0.1",
        port=port,
        log_path=directory / "gateway.log",
        environment=environment,
    )


def test_listens_without_a_server_but_is_not_ready(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gateway = make_gateway(tmp_path)
    gateway.start()
    try:
        gateway.wait_listening()
        pids = [process.pid for process in gateway.processes()]
        monkeypatch.setattr(module, "READY_TIMEOUT_S", 0.1)
        with pytest.raises(LauncherError, match=r"the gateway is not ready after 0 s: not ready: no server at"):
            gateway.wait_ready()
        begin = time.monotonic()
    finally:
        gateway.stop()
    assert time.monotonic() - begin < 5
    assert pids
    assert not any(map(is_running, pids))
    assert (tmp_path / "gateway.log").read_text() == ""


def test_a_taken_port_is_named(tmp_path: Path) -> None:
    gateway = make_gateway(tmp_path)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", gateway.port))
        taken.listen()
        with pytest.raises(LauncherError, match=rf"gateway port {gateway.port} .* choose another --gateway-port"):
            gateway.start()


def test_a_startup_error_is_reported_in_one_line(tmp_path: Path) -> None:
    gateway = make_gateway(tmp_path, {"AUTOGLM_API_KEYS": str(tmp_path / "nowhere")})
    gateway.start()
    try:
        with pytest.raises(
            LauncherError, match=r"the gateway did not start: gateway: .*nowhere cannot be read: No such file"
        ):
            gateway.wait_listening()
    finally:
        gateway.stop(now=True)


def test_a_killed_gateway_is_restarted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(restart, "FIRST_WAIT_S", 0.1)
    gateway = make_gateway(tmp_path)
    gateway.start()
    restarter = Restarter(gateway, gateway.start, gateway.failure)
    try:
        for wait_s in (0.1, 0.2):
            gateway.wait_listening()
            kill(gateway)
            begin = time.monotonic()
            restarter.check()
            assert "error: the gateway ended: killed by SIGKILL" in capfd.readouterr().err
            while not gateway.is_alive():
                restarter.check()
            assert time.monotonic() - begin >= wait_s
            assert "the gateway is running again" in capfd.readouterr().out
        gateway.wait_listening()
        kill(gateway)
        restarter.check()
        capfd.readouterr()
        with socket.socket() as taken:
            taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            taken.bind(("127.0.0.1", gateway.port))
            taken.listen()
            time.sleep(0.45)
            restarter.check()
            assert f"error: gateway port {gateway.port} cannot be used" in capfd.readouterr().err
            assert not gateway.is_alive()
        time.sleep(0.85)
        restarter.check()
        gateway.wait_listening()
        assert fault_of(gateway.address, "/health") is None
    finally:
        gateway.stop(now=True)


def kill(gateway: GatewayProcess) -> None:
    for process in gateway.processes():
        os.kill(process.pid, signal.SIGKILL)
    while gateway.is_alive():
        time.sleep(0.01)
