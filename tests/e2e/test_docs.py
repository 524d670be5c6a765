"""The commands and examples in the documentation work as shown, on the test's own ports."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from autoglm_launcher.server import TritonServer
from tests.e2e.conftest import ROOT
from tests.e2e.test_launcher import START_S, launched

API = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")


def with_ports(text: str, server: TritonServer) -> str:
    return text.replace("127.0.0.1:8000", server.http_address).replace("127.0.0.1:8001", server.grpc_url)


def without_numbers(line: str) -> str:
    return re.sub(r"\d+", "N", line)


@pytest.mark.parametrize("page", ["README.md", "docs/speech.md"])
def test_once(page: str, demo_checkpoint: Path, tmp_path: Path) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    ((options, shown),) = re.findall(r"^\$ \./run_autoglm_server\.sh (.*)\n((?:.+\n)*)```", text, re.MULTILINE)
    with launched(demo_checkpoint, tmp_path, *options.split()) as launcher:
        assert launcher.process.wait(START_S) == 0, launcher.output
        # On a terminal, as shown, a line of progress is replaced by the next one.
        printed = [line for line in launcher.output.splitlines() if " ..." not in line]
    assert list(map(without_numbers, printed)) == list(map(without_numbers, shown.splitlines()))


def test_python_example(server: TritonServer, tmp_path: Path) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", API, re.DOTALL)
    sample = next((ROOT / "demo" / "samples").glob("*.png"))
    (tmp_path / "screen.png").write_bytes(sample.read_bytes())
    ran = subprocess.run(
        [sys.executable, "-c", with_ports(example, server)], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert ran.returncode == 0, ran.stderr
    assert "Usage(" in ran.stdout


def test_curl(server: TritonServer) -> None:
    (command,) = re.findall(r"^\$ (.*\n  curl .*)$", API, re.MULTILINE)
    ran = subprocess.run(
        ["bash", "-c", with_ports(command, server)], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert '"FINISH_REASON":"stop"' in ran.stdout, ran.stdout + ran.stderr


def test_command_line(server: TritonServer, tmp_path: Path) -> None:
    ((command, shown),) = re.findall(r"^\$ (autoglm ask .*)\n((?:.+\n)*)```", API, re.MULTILINE)
    command = f"{command} --server {server.grpc_url}".replace("out.png", str(tmp_path / "out.png"))
    environment = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin"}
    ran = subprocess.run(["bash", "-c", command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stderr
    assert (tmp_path / "out.png").is_file()
    printed = [line for line in shown.splitlines() if "ms" not in line]
    assert printed
    for line in printed:
        assert line in ran.stdout
