import os
from pathlib import Path

import pytest

from autoglm_launcher import bootstrap, venv
from autoglm_launcher.ports import free_ports


@pytest.mark.parametrize(("options", "extras"), [([], ["gateway"]), (["--no-gateway"], []), (["--once"], [])])
def test_installs_the_requirements_of_the_processes_that_it_starts(
    options: list[str], extras: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    installed: list[list[str]] = []
    started: list[list[str]] = []

    def prepare(extras: list[str]) -> Path:
        installed.append(extras)
        return Path("/venv/bin/python")

    monkeypatch.setattr(venv, "prepare", prepare)
    monkeypatch.setattr(bootstrap, "raise_on_signals", lambda: None)
    monkeypatch.setattr(os, "execv", lambda python, command: started.append(command))
    names = ("--http-port", "--grpc-port", "--metrics-port", "--gateway-port")
    ports = [word for name, port in zip(names, free_ports(4), strict=True) for word in (name, str(port))]
    bootstrap.main([*ports, *options])
    assert installed == [extras]
    assert started == [["/venv/bin/python", "-m", "autoglm_launcher", *ports, *options]]
