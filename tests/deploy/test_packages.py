"""Every package that the Dockerfile and the launcher install exists. Skipped if no registry is reachable."""

import re
import shutil
import subprocess
import sys

import pytest

from autoglm_launcher import ROOT

CONSTRAINTS = ROOT / "constraints" / f"py3{sys.version_info.minor}.txt"


def requirements() -> list[str]:
    """The dependencies of the two projects and of the gateway."""
    found = []
    lists = ("pyproject.toml", "dependencies"), ("client/pyproject.toml", "dependencies"), ("pyproject.toml", "gateway")
    for name, key in lists:
        listed = re.search(rf"^{key} = \[\n(.*?)^\]", (ROOT / name).read_text(), re.MULTILINE | re.DOTALL)
        assert listed, name
        found += re.findall(r'^\s*"([^"]+)"', listed[1], re.MULTILINE)
    return sorted(set(found))


def apt_packages() -> list[str]:
    text = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
    (listed,) = re.findall(r"apt-get install -y --no-install-recommends ([^&]+)&&", text)
    return str(listed).split()


def pip(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "pip", *arguments, "--disable-pip-version-check"]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_the_lists_are_found() -> None:
    assert "numpy>=1.26,<2" in requirements()
    assert any(name.startswith("tritonclient") for name in requirements())
    assert any(name.startswith("fastapi") for name in requirements())
    assert "python3-venv" in apt_packages()


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> None:
    if pip("download", "--no-deps", "-d", str(tmp_path_factory.mktemp("download")), "iniconfig").returncode:
        pytest.skip("no package registry is reachable")


@pytest.mark.usefixtures("registry")
def test_every_pip_requirement_resolves() -> None:
    # Without --ignore-installed, pip would not ask the registry.
    resolved = pip("install", "--dry-run", "--no-deps", "--ignore-installed", "-c", str(CONSTRAINTS), *requirements())
    assert resolved.returncode == 0, resolved.stderr[-1000:]
    assert "Would install" in resolved.stdout


def test_every_apt_package_exists() -> None:
    if shutil.which("apt-cache") is None:
        pytest.skip("no apt-cache: this is neither Debian nor Ubuntu")
    known = subprocess.run(["apt-cache", "pkgnames"], capture_output=True, text=True).stdout.split()
    if len(known) < 10_000:
        pytest.skip("apt has no package lists: apt-get update")
    assert set(apt_packages()) <= set(known)
