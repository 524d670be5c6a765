"""What the README shows works as it stands there, on the test's own ports."""

import re
import subprocess
import sys
from pathlib import Path

from autoglm_launcher.server import TritonServer
from tests.e2e.conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def with_ports(text: str, server: TritonServer) -> str:
    return text.replace("127.0.0.1:8000", server.http_address).replace("127.0.0.1:8001", server.grpc_url)


def test_python_example(server: TritonServer, tmp_path: Path) -> None:
    (example,) = (code for code in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "autoglm_client" in code)
    sample = next((ROOT / "demo" / "samples").glob("*.png"))
    (tmp_path / "screen.png").write_bytes(sample.read_bytes())
    ran = subprocess.run(
        [sys.executable, "-c", with_ports(example, server)], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert ran.returncode == 0, ran.stderr
    assert "Usage(" in ran.stdout


def test_curl(server: TritonServer) -> None:
    (command,) = re.findall(r"^\$ (.*\n  curl .*)$", README, re.MULTILINE)
    ran = subprocess.run(
        ["bash", "-c", with_ports(command, server)], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert '"FINISH_REASON":"stop"' in ran.stdout, ran.stdout + ran.stderr


def test_command_line(server: TritonServer, tmp_path: Path) -> None:
    (shown,) = re.findall(r"^\$ (autoglm ask .*)\n((?:.+\n)*)```", README, re.MULTILINE)
    command = f"{shown[0]} --server {server.grpc_url}".replace("out.png", str(tmp_path / "out.png"))
    environment = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin"}
    ran = subprocess.run(["bash", "-c", command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stderr
    assert (tmp_path / "out.png").is_file()
    printed = [line for line in shown[1].splitlines() if "ms" not in line]
    assert printed
    for line in printed:
        assert line in ran.stdout


def test_every_path_exists() -> None:
    """Files and folders in code font are there."""
    paths = re.findall(r"`([a-z_\-]+(?:/[\w.\-]*)+|[\w\-]+\.(?:yaml|yml|sh|md))`", README)
    missing = [path for path in paths if not (ROOT / path).exists()]
    assert not missing
