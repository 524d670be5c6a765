import sysconfig
from importlib import metadata, util
from pathlib import Path

import pytest

from autoglm_launcher.console import LauncherError
from autoglm_launcher.tritonserver import STUB, Installation, check_numpy, libpython_directory


def test_numpy_2_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "version", lambda name: "2.1.0")
    with pytest.raises(LauncherError, match=r"with numpy 2\.1\.0 .* pip install 'numpy>=1.26,<2'"):
        check_numpy()


def test_the_installed_numpy_is_accepted() -> None:
    check_numpy()


@pytest.mark.tritonserver
def test_the_wheel_gets_the_stub_for_this_python() -> None:
    found = Installation.from_wheel()
    assert found.executable.is_file()
    stub = found.backends / "python" / STUB
    assert stub.stat().st_mode & 0o111
    assert list(libpython_directory().glob("libpython3*.so*"))


def test_a_missing_wheel_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(util, "find_spec", lambda name: None)
    with pytest.raises(LauncherError, match="nvidia-pytriton is not installed"):
        Installation.from_wheel()


def test_the_layout_of_a_container_image(tmp_path: Path) -> None:
    executable = tmp_path / "bin" / "tritonserver"
    executable.parent.mkdir()
    executable.write_text("#!/bin/sh\n")
    with pytest.raises(LauncherError, match=r"--tritonserver must be .* is not executable"):
        Installation.from_executable(executable)
    executable.chmod(0o755)
    with pytest.raises(LauncherError, match="has no Python backend"):
        Installation.from_executable(executable)
    (tmp_path / "backends" / "python").mkdir(parents=True)
    assert Installation.from_executable(executable).backends == tmp_path / "backends"


def test_a_missing_libpython_names_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sysconfig, "get_config_var", lambda name: {"LIBDIR": "/nowhere"}.get(name))
    with pytest.raises(LauncherError, match=r"apt-get install libpython3\.1\d"):
        libpython_directory()
