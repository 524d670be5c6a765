"""The wheel contains all packages that the server needs, and their data files."""

import shutil
import subprocess
import sys
import zipfile
from importlib import metadata

import autoglm_client
import pytest

from autoglm_launcher import ROOT

PACKAGES = ("autoglm", "autoglm_launcher", "gateway")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """The names of the files in a wheel, built from a copy because a build writes into its directory."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for package in (*PACKAGES, "client", "demo", "tests/deploy"):
        ignored = shutil.ignore_patterns("__pycache__", "checkpoint", "samples")
        shutil.copytree(ROOT / package, source / package, ignore=ignored)
    code = "from setuptools import build_meta; print(build_meta.build_wheel('out'))"
    built = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True, timeout=120)
    assert built.returncode == 0, built.stderr
    with zipfile.ZipFile(source / "out" / built.stdout.splitlines()[-1]) as archive:
        return set(archive.namelist())


@pytest.mark.parametrize("package", PACKAGES)
def test_every_file_of_a_package_is_included(wheel: set[str], package: str) -> None:
    here = {path.relative_to(ROOT).as_posix() for path in (ROOT / package).rglob("*") if path.is_file()}
    assert {path for path in here if "__pycache__" not in path} <= wheel


def test_nothing_else_is_included(wheel: set[str]) -> None:
    assert {name.split("/")[0] for name in wheel if ".dist-info/" not in name} == set(PACKAGES)


def test_the_licence_and_the_version_are_included(wheel: set[str]) -> None:
    assert f"autoglm_triton-{autoglm_client.__version__}.dist-info/licenses/LICENSE" in wheel


def test_server_and_client_have_one_version() -> None:
    assert metadata.version("autoglm-triton") == metadata.version("autoglm-client") == autoglm_client.__version__
