import shutil
import sys
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib import util
from pathlib import Path
from threading import Thread

import pytest

from autoglm_launcher import ROOT, venv
from autoglm_launcher.console import LauncherError


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the requirements, with a .venv whose python, without any package, records its arguments."""
    for name in ("pyproject.toml", "client/pyproject.toml", "constraints/py310.txt", "constraints/py311.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    for name, path in (("ROOT", "."), ("VENV", ".venv"), ("PYTHON", ".venv/bin/python"), ("LOG", ".venv/install.log")):
        monkeypatch.setattr(venv, name, tmp_path / path)
    monkeypatch.setattr(venv, "STAMP", tmp_path / ".venv" / "stamp.json")
    monkeypatch.setattr(venv, "CPU_INDEX", "http://127.0.0.1:1/cpu")  # refuses the connection
    fake_python(tmp_path, 'echo "$@" $PIP_CONSTRAINT $PIP_BUILD_CONSTRAINT >> "$(dirname "$0")/calls"')
    return tmp_path


def fake_python(project: Path, script: str) -> None:
    python = project / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True, exist_ok=True)
    python.write_text(f"#!/bin/sh\ncase $* in *version_info*) echo 3.11; exit;; esac\n{script}\n")
    python.chmod(0o755)


def installs(project: Path) -> list[str]:
    calls = project / ".venv" / "bin" / "calls"
    lines = calls.read_text().splitlines() if calls.exists() else []
    calls.unlink(missing_ok=True)
    return [line.split("--progress-bar=off ")[1] for line in lines if "pip install" in line]


def test_installs_torch_first_and_everything_at_pinned_versions(project: Path) -> None:
    venv.prepare(["test"])
    torch, server, rest = installs(project)
    pins = " ".join([f"file://{project}/constraints/py311.txt"] * 2)
    assert torch == f"torch==2.13.0 {pins}"
    assert server == "--no-deps nvidia-pytriton==0.7.0"
    assert rest == f"-e {project}[test] -e {project}/client {pins}"


@pytest.mark.parametrize(("answer", "count"), [(f'exec {sys.executable} "$@"', 2), ("echo torch==2.12.1", 3)])
def test_any_installed_build_of_the_pinned_torch_is_kept(project: Path, answer: str, count: int) -> None:
    fake_python(project, f'echo "$@" >> "$(dirname "$0")/calls"\ncase $* in *metadata*) {answer};; esac')
    venv.prepare()
    assert len(installs(project)) == count


def test_a_second_time_installs_nothing(project: Path) -> None:
    venv.prepare(["test"])
    installs(project)
    venv.prepare(["test"])
    venv.prepare()
    assert installs(project) == []


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints/py311.txt"])
def test_installs_again_when_requirements_change(project: Path, name: str) -> None:
    venv.prepare(["test"])
    installs(project)
    with (project / name).open("a") as file:
        file.write("\n")
    venv.prepare()
    assert installs(project)[-1].startswith(f"-e {project}[test] -e {project}/client ")


def test_a_failed_installation_is_not_recorded(project: Path) -> None:
    fake_python(project, 'case "$*" in *"pip install"*) echo "ERROR: No matching distribution"; exit 1;; esac')
    with pytest.raises(LauncherError, match=r"installing PyTorch failed: No matching distribution .*install\.log"):
        venv.prepare()
    assert not venv.STAMP.exists()


def test_a_full_disk_is_named(project: Path) -> None:
    fake_python(
        project, 'case "$*" in *"pip install"*) echo "OSError: [Errno 28] No space left on device"; exit 1;; esac'
    )
    with pytest.raises(LauncherError, match="the disk is full; free space at"):
        venv.prepare()


def test_too_little_free_space_is_reported_before_installing(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 2**30))  # type: ignore[attr-defined]
    with pytest.raises(LauncherError, match=r"requires about \d+ GiB at .* \(free: 1\.0 GiB\)"):
        venv.prepare()
    assert installs(project) == []


def test_the_index_for_pytorch_is_used_only_for_pytorch(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTOGLM_TORCH_INDEX", "https://example.org/cpu")
    venv.prepare()
    with_index = [line for line in installs(project) if "--index-url" in line]
    assert with_index == ["torch==2.13.0 --index-url https://example.org/cpu"]


@pytest.mark.parametrize("gpus", [[], ["a GPU"]])
def test_the_cpu_build_is_the_default_without_a_gpu(
    project: Path, monkeypatch: pytest.MonkeyPatch, gpus: list[str]
) -> None:
    (project / "torch").mkdir()
    monkeypatch.setattr(venv, "list_gpus", lambda: gpus)
    monkeypatch.setattr(venv, "missing_packages", lambda: [])
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=str(project))) as index:
        Thread(target=index.serve_forever).start()
        monkeypatch.setattr(venv, "CPU_INDEX", f"http://127.0.0.1:{index.server_port}")
        venv.prepare()
        index.shutdown()
    assert (f"--index-url {venv.CPU_INDEX}" in installs(project)[0]) == (not gpus)


def test_this_python_lacks_nothing() -> None:
    assert venv.missing_packages() == []


def test_missing_packages_have_debian_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "base_prefix", "/usr")
    monkeypatch.setattr(sys, "version_info", (3, 12, 1))
    named = type("Version", (tuple,), {"major": 3, "minor": 12})((3, 12, 1))
    monkeypatch.setattr(sys, "version_info", named)
    monkeypatch.setattr(util, "find_spec", lambda name: None)
    monkeypatch.setattr(venv, "libpython_directory", _no_libpython)
    assert venv.missing_packages() == ["python3.12-venv", "libpython3.12"]


def test_gpus_require_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(venv, "list_gpus", lambda: ["a GPU"])
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"include": "/nowhere"})
    assert venv.missing_packages() == ["gcc", f"libpython3.{sys.version_info.minor}-dev"]


def test_packages_do_not_help_a_python_outside_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "base_prefix", "/opt/python")
    monkeypatch.setattr(venv, "libpython_directory", _no_libpython)
    with pytest.raises(LauncherError, match="was built without libpython3"):
        venv.missing_packages()


def _no_libpython() -> Path:
    raise LauncherError("no libpython")
