import re
import shutil
import sys
from importlib import util
from pathlib import Path

import pytest

from autoglm_launcher import ROOT
from autoglm_launcher import venv as environment
from autoglm_launcher.console import LauncherError
from autoglm_launcher.venv import TORCH


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of what decides the installation, with a .venv whose python writes down what it is asked."""
    for name in ("pyproject.toml", "client/pyproject.toml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    for name, path in (("ROOT", "."), ("VENV", ".venv"), ("PYTHON", ".venv/bin/python"), ("LOG", ".venv/install.log")):
        monkeypatch.setattr(environment, name, tmp_path / path)
    monkeypatch.setattr(environment, "STAMP", tmp_path / ".venv" / "stamp.json")
    fake_python(tmp_path, 'echo "$@" >> "$(dirname "$0")/calls"\ncase "$*" in *find_spec*) exit 1;; esac')
    return tmp_path


def fake_python(project: Path, script: str) -> None:
    python = project / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True, exist_ok=True)
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)


def installs(project: Path) -> list[str]:
    calls = project / ".venv" / "bin" / "calls"
    lines = calls.read_text().splitlines() if calls.exists() else []
    calls.unlink(missing_ok=True)
    return [line.split("--progress-bar=off ")[1] for line in lines if "pip install" in line]


def test_installs_torch_by_its_exact_version_first(project: Path) -> None:
    environment.prepare(["test"])
    torch, server, rest = installs(project)
    assert torch == "torch==2.13.0"
    assert server == "--no-deps nvidia-pytriton==0.7.0"
    assert rest == f"-e {project}[test] -e {project}/client"


def test_a_second_time_installs_nothing(project: Path) -> None:
    environment.prepare(["test"])
    installs(project)
    environment.prepare(["test"])
    environment.prepare()
    assert installs(project) == []


def test_installs_again_when_requirements_change(project: Path) -> None:
    environment.prepare(["test"])
    installs(project)
    with (project / "pyproject.toml").open("a") as file:
        file.write("\n")
    environment.prepare()
    assert installs(project)[-1] == f"-e {project}[test] -e {project}/client"


def test_an_installation_that_failed_is_not_taken_for_done(project: Path) -> None:
    fake_python(project, 'case "$*" in *"pip install"*) echo "ERROR: No matching distribution"; exit 1;; esac')
    with pytest.raises(
        LauncherError, match=r"installing the Triton server failed: No matching distribution .*install\.log"
    ):
        environment.prepare()
    assert not environment.STAMP.exists()


def test_a_full_disk_is_called_so(project: Path) -> None:
    fake_python(
        project, 'case "$*" in *"pip install"*) echo "OSError: [Errno 28] No space left on device"; exit 1;; esac'
    )
    with pytest.raises(LauncherError, match="the disk is full: make room at"):
        environment.prepare()


def test_too_little_room_is_said_before_installing(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 2**30))  # type: ignore[attr-defined]
    with pytest.raises(LauncherError, match=r"1\.0 GiB are free at .* needs about \d+ GiB"):
        environment.prepare()
    assert installs(project) == []


def test_an_index_for_pytorch_is_used_for_pytorch_alone(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTOGLM_TORCH_INDEX", "https://example.org/cpu")
    environment.prepare()
    with_index = [line for line in installs(project) if "--index-url" in line]
    assert with_index == ["torch==2.13.0 --index-url https://example.org/cpu"]


def test_this_python_lacks_nothing() -> None:
    assert environment.missing_packages() == []


def test_missing_packages_have_debian_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "base_prefix", "/usr")
    monkeypatch.setattr(sys, "version_info", (3, 12, 1))
    named = type("Version", (tuple,), {"major": 3, "minor": 12})((3, 12, 1))
    monkeypatch.setattr(sys, "version_info", named)
    monkeypatch.setattr(util, "find_spec", lambda name: None)
    monkeypatch.setattr(environment, "libpython_directory", _no_libpython)
    assert environment.missing_packages() == ["python3.12-venv", "libpython3.12"]


def test_gpus_need_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "list_gpus", lambda: ["a GPU"])
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"include": "/nowhere"})
    assert environment.missing_packages() == ["gcc", f"libpython3.{sys.version_info.minor}-dev"]


def test_a_python_outside_the_system_is_not_helped_by_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "base_prefix", "/opt/python")
    monkeypatch.setattr(environment, "libpython_directory", _no_libpython)
    with pytest.raises(LauncherError, match="was built without libpython3"):
        environment.missing_packages()


def test_the_pinned_torch_lies_in_the_range_of_the_project() -> None:
    low, high = re.findall(r'"torch>=([\d.]+),<([\d.]+)"', (ROOT / "pyproject.toml").read_text())[0]

    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(".")]

    assert numbers(low) <= numbers(TORCH.removeprefix("torch==")) < numbers(high)


def _no_libpython() -> Path:
    raise LauncherError("no libpython")
