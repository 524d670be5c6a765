"""The command line and environment of a tritonserver, and the reading of its log; none is started."""

import sys
from pathlib import Path

import pytest

from autoglm_launcher import gpus
from autoglm_launcher.ports import Ports
from autoglm_launcher.server import TritonServer
from autoglm_launcher.tritonserver import Installation

INSTALLATION = Installation(Path("/opt/tritonserver/bin/tritonserver"), Path("/backends"), ("/lib/python",))
LOG = """I1126 12:00:00.1 7 server.cc:300] "starting"
W1126 12:00:01.1 7 metrics.cc:55] "CUDA driver version is insufficient"
{}
"""


def test_the_command_line_and_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTOGLM_ADMIN_KEY", "secret")
    monkeypatch.setenv("LD_LIBRARY_PATH", "/usr/local/cuda/lib64")
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.setattr(gpus, "list_gpus", lambda: [gpus.Gpu(index, "NVIDIA H200") for index in range(4)])
    server = TritonServer(
        repository=tmp_path,
        checkpoint=tmp_path / "checkpoint",
        preset=tmp_path / "edge.yaml",
        installation=INSTALLATION,
        host="0.0.0.0",
        ports=Ports(1, 2, 3),
        gpus=(1, 3),
        environment={"EXTRA": "1"},
    )
    command = server.command()
    assert command[0] == "/opt/tritonserver/bin/tritonserver"
    assert "--model-control-mode=none" in command
    assert [part for part in command if "address" in part] == [
        "--http-address=0.0.0.0",
        "--grpc-address=0.0.0.0",
        "--metrics-address=0.0.0.0",
    ]
    assert [part for part in command if "cuda-memory-pool" in part] == [
        "--cuda-memory-pool-byte-size=0:536870912",
        "--cuda-memory-pool-byte-size=1:536870912",
    ]
    assert len([part for part in command if part.endswith(":autoglm-admin-key=secret")]) == 2
    environment = server.environment
    assert environment["CUDA_VISIBLE_DEVICES"] == "1,3"
    assert environment["AUTOGLM_CHECKPOINT"] == str(tmp_path / "checkpoint")
    assert environment["AUTOGLM_PRESET"] == str(tmp_path / "edge.yaml")
    assert environment["LD_LIBRARY_PATH"] == "/lib/python:/usr/local/cuda/lib64"
    assert environment["PATH"].startswith(f"{Path(sys.executable).parent}:")
    assert environment["OMP_WAIT_POLICY"] == "PASSIVE"
    assert environment["EXTRA"] == "1"
    assert server.http_url == "http://127.0.0.1:1"


@pytest.mark.parametrize(
    ("line", "telling"),
    [
        (
            "E1 failed to load 'small' version 1: Internal: ValueError: no\\nAt: x.py",
            "model small: Internal: ValueError: no",
        ),
        ('E1126 12:00:02.1 7 main.cc:9] "failed to start HTTP service"\nI1126 bye', "failed to start HTTP service"),
        ("I1126 bye", "I1126 bye"),
        ("NVML: not found", 'I1126 12:00:00.1 7 server.cc:300] "starting'),
    ],
)
def test_the_telling_line_of_a_log(tmp_path: Path, line: str, telling: str) -> None:
    assert TritonServer(repository=tmp_path, installation=INSTALLATION).telling_line(LOG.format(line)) == telling
