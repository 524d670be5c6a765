"""find_python.sh with a restricted PATH."""

import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path

import pytest

from autoglm_launcher import ROOT
from autoglm_launcher.tritonserver import libpython_directory

UV = Path(sysconfig.get_path("scripts")) / "uv"
VERSION = f"python3.{sys.version_info.minor}"
# A Python 3.14 with venv, whose pip installs the uv of this test, or nothing.
NEWER = """#!/bin/sh
case "$*" in
    *platform.python_version*) echo 3.14.2;;
    *ensurepip*) exit 0;;
    "-m venv "*) mkdir -p "$3/bin"; ln -s ../../../pip "$3/bin/pip";;
esac
"""
PIP = f"""#!/bin/sh
[ "$*" = "install -c constraints/py312.txt uv" ] && ln -s {UV} .python/uv/bin/uv
"""


class Host:
    """A repository, and a PATH with the tools that find_python.sh uses, a Python 3.14, and no other Python."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.bin = directory / "bin"
        self.bin.mkdir()
        self.environment = {"PATH": str(self.bin), "HOME": str(directory / "home")}
        (directory / "autoglm_launcher").symlink_to(ROOT / "autoglm_launcher")
        for tool in ("bash", "id", "ln", "mkdir"):
            (self.bin / tool).symlink_to(shutil.which(tool) or tool)
        self.add_program(self.bin / "python3", NEWER)

    def add_program(self, path: Path, script: str) -> None:
        path.write_text(script)
        path.chmod(0o755)

    def offer(self, archive: Path) -> None:
        """Let uv find this archive, which may be missing, as the only Python that it can download."""
        python = {
            "name": "cpython",
            "arch": {"family": platform.machine(), "variant": None},
            "os": "linux",
            "libc": "gnu",
            "major": 3,
            "minor": 12,
            "patch": 99,
            "prerelease": "",
            "url": archive.as_uri(),
            "sha256": None,
            "variant": None,
            "build": "20261126",
        }
        downloads = self.directory / "downloads.json"
        downloads.write_text(json.dumps({f"cpython-3.12.99-linux-{platform.machine()}-gnu": python}))
        self.environment["UV_PYTHON_DOWNLOADS_JSON_URL"] = downloads.as_uri()

    def find_python(self) -> "subprocess.CompletedProcess[str]":
        command = ["bash", "-c", 'set -euo pipefail; . autoglm_launcher/find_python.sh; echo "found $PYTHON"']
        return subprocess.run(command, cwd=self.directory, env=self.environment, capture_output=True, text=True)


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """This interpreter in the layout of the releases that uv downloads (python-build-standalone), presented as 3.12."""
    left_out = {"__pycache__", "site-packages", "dist-packages", "test", "idlelib", "tkinter", "lib2to3", "pydoc_data"}

    def choose(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
        name = member.name.split("/")[-1]
        absolute = member.linkname.startswith("/")  # uv rejects such links, which Debian has
        return None if absolute or name in left_out or name.startswith("config-") else member

    library, stdlib = sysconfig.get_config_var("INSTSONAME"), Path(sysconfig.get_path("stdlib"))
    path = tmp_path_factory.mktemp("releases") / "cpython.tar.gz"
    with tarfile.open(path, "w:gz", compresslevel=1) as tar:
        tar.add(Path(sys.executable).resolve(), f"python/bin/{VERSION}")
        tar.add((libpython_directory() / library).resolve(), f"python/lib/{library}")
        tar.add(stdlib, f"python/lib/{VERSION}", filter=choose)
        if VERSION != "python3.12":  # uv looks for this file there
            for data in stdlib.glob("_sysconfigdata_*.py"):
                tar.add(data, f"python/lib/python3.12/{data.name}")
        link = tarfile.TarInfo("python/bin/python3")
        link.type, link.linkname = tarfile.SYMTYPE, VERSION
        tar.addfile(link)
    return path


@pytest.mark.parametrize("uv_in_path", [True, False])
def test_downloads_python_312_where_only_a_newer_one_is_installed(host: Host, archive: Path, uv_in_path: bool) -> None:
    if uv_in_path:
        (host.bin / "uv").symlink_to(UV)
    else:
        host.add_program(host.directory / "pip", PIP)
    host.offer(archive)
    first = host.find_python()
    assert first.returncode == 0, first.stderr
    *messages, found = first.stdout.splitlines()
    assert messages == ["autoglm: downloading Python 3.12 into .python/"]
    python = Path(found.removeprefix("found "))
    assert python.is_relative_to(host.directory / ".python")
    assert not list(host.directory.glob("home/.local/bin/*"))

    code = "import sys; from autoglm_launcher.tritonserver import libpython_directory as library; print(library())"
    library = subprocess.run(
        [python, "-c", code], cwd=host.directory, capture_output=True, text=True, check=True
    ).stdout
    assert Path(library.strip()) == python.parents[1] / "lib"
    venv = subprocess.run([python, "-m", "venv", "--without-pip", host.directory / "venv"])
    assert venv.returncode == 0

    host.offer(Path("/nowhere"))
    second = host.find_python()
    assert (second.returncode, second.stdout) == (0, f"{found}\n"), "the second time it is not downloaded again"


@pytest.mark.parametrize("uv_in_path", [True, False])
def test_prints_the_commands_if_the_download_fails(host: Host, uv_in_path: bool) -> None:
    if uv_in_path:
        (host.bin / "uv").symlink_to(UV)
    else:
        host.add_program(host.directory / "pip", "#!/bin/sh\nexit 1\n")
    host.offer(Path("/nowhere/cpython.tar.gz"))
    result = host.find_python()
    assert result.returncode == 1
    message, *commands = result.stderr.splitlines()
    assert message == (
        "autoglm: error: no Python 3.10, 3.11 or 3.12 found, and Python 3.12 could not be downloaded "
        "(log: .python/install.log). Once the network allows it, run:"
    )
    uv = str(host.bin / "uv") if uv_in_path else ".python/uv/bin/uv"
    install_uv = [f"{host.bin}/python3 -m venv .python/uv", ".python/uv/bin/pip install -c constraints/py312.txt uv"]
    assert [command.strip() for command in commands] == [
        f"cd {host.directory}",
        *([] if uv_in_path else install_uv),
        f"UV_PYTHON_INSTALL_DIR=.python UV_PYTHON_INSTALL_BIN=0 {uv} python install 3.12",
    ]


def test_the_printed_commands_include_the_package_that_venv_needs(host: Host) -> None:
    host.add_program(host.bin / "python3", NEWER.replace("exit 0", "exit 1"))
    result = host.find_python()
    assert result.returncode == 1
    assert [line.strip() for line in result.stderr.splitlines()][2:4] == [
        "sudo apt-get install python3-venv",
        f"{host.bin}/python3 -m venv .python/uv",
    ]


def test_the_first_suitable_python_in_path_is_used(host: Host) -> None:
    later = host.directory / "later"
    later.mkdir()
    (later / "python3").symlink_to(sys.executable)
    host.environment["PATH"] += f"{os.pathsep}{later}"
    assert host.find_python().stdout == f"found {later}/python3\n"


@pytest.mark.parametrize("version", ["3.9.2", "3.13.1"])
def test_an_unsuitable_python_that_was_chosen_is_an_error(tmp_path: Path, version: str) -> None:
    chosen = tmp_path / "python3"
    chosen.write_text(f"#!/bin/sh\necho {version}\n")
    chosen.chmod(0o755)
    command = [str(ROOT / "run_autoglm_server.sh"), "--help"]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "AUTOGLM_PYTHON": str(chosen)})
    assert result.returncode == 1
    assert len(result.stderr.splitlines()) == 1
    assert "no Python 3.10, 3.11 or 3.12" in result.stderr
    assert f"{chosen} is {version}" in result.stderr
