"""The launcher's Gateway: a real `python -m gateway`, with no server behind it."""

import os
import signal
import socket
import time
from pathlib import Path

import pytest

from autoglm_launcher import gateway as module
from autoglm_launcher.console import LauncherError
from autoglm_launcher.gateway import Gateway, fault_of
from autoglm_launcher.ports import free_ports
from autoglm_launcher.processes import is_running


def made(directory: Path, environment: dict[str, str] | None = None) -> Gateway:
    nobody, port = free_ports(2)
    return Gateway(f"127.0.0.1:{nobody}", "127.0.0.1", port, directory / "gateway.log", environment)


def test_listens_without_a_server_but_is_not_ready(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gateway = made(tmp_path)
    gateway.start()
    try:
        gateway.wait_listening()
        pids = [process.pid for process in gateway.processes()]
        monkeypatch.setattr(module, "READY_WITHIN_S", 0.1)
        with pytest.raises(LauncherError, match=r"the gateway is not ready after 0 s: not ready: no server at"):
            gateway.wait_ready()
        begin = time.monotonic()
    finally:
        gateway.stop()
    assert time.monotonic() - begin < 5
    assert pids
    assert not any(map(is_running, pids))
    assert (tmp_path / "gateway.log").read_text() == ""


def test_a_port_that_is_taken_is_named(tmp_path: Path) -> None:
    gateway = made(tmp_path)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", gateway.port))
        taken.listen()
        with pytest.raises(LauncherError, match=rf"gateway port {gateway.port} .* give --gateway-port another number"):
            gateway.start()


def test_what_keeps_it_from_starting_is_told_in_one_line(tmp_path: Path) -> None:
    gateway = made(tmp_path, {"AUTOGLM_API_KEYS": str(tmp_path / "nowhere")})
    gateway.start()
    try:
        with pytest.raises(LauncherError, match=r"the gateway did not start: gateway: .*No such file .*nowhere"):
            gateway.wait_listening()
    finally:
        gateway.stop(now=True)


def test_revives_what_was_killed_after_a_wait_that_grows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "FIRST_BACK_OFF_S", 0.2)
    gateway = made(tmp_path)
    gateway.start()
    try:
        for back_off_s in (0.2, 0.4):
            gateway.wait_listening()
            for process in gateway.processes():
                os.kill(process.pid, signal.SIGKILL)
            while gateway.is_alive():
                time.sleep(0.01)
            begin = time.monotonic()
            gateway.revive()
            assert "error: the gateway ended: SIGKILL ended it" in capfd.readouterr().err
            while not gateway.is_alive():
                gateway.revive()
            assert time.monotonic() - begin >= back_off_s
            assert "the gateway is started again" in capfd.readouterr().out
        gateway.wait_listening()
        monkeypatch.setattr(module, "PROVEN_AFTER_S", 0.0)
        for process in gateway.processes():
            os.kill(process.pid, signal.SIGKILL)
        while gateway.is_alive():
            time.sleep(0.01)
        gateway.revive()
        assert gateway._back_off_s == 0.4, "what has proved itself begins with the shortest wait"
        with socket.socket() as taken:
            taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            taken.bind(("127.0.0.1", gateway.port))
            taken.listen()
            time.sleep(0.25)
            gateway.revive()
            assert f"error: gateway port {gateway.port} cannot be used" in capfd.readouterr().err
            assert not gateway.is_alive()
        time.sleep(0.45)
        gateway.revive()
        gateway.wait_listening()
        assert fault_of(f"127.0.0.1:{gateway.port}", "/health") is None
    finally:
        gateway.stop(now=True)
