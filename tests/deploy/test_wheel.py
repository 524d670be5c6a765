"""What the wheel holds: all packages that the server needs, and the files that are no Python."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("autoglm", "autoglm_launcher", "gateway")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """The names of the files in a wheel built of a copy, for a build writes into its folder."""
    source = tmp_path_factory.mktemp("source")
    shutil.copy(ROOT / "pyproject.toml", source)
    for package in (*PACKAGES, "demo", "tests/deploy"):
        ignored = shutil.ignore_patterns("__pycache__", "checkpoint", "samples")
        shutil.copytree(ROOT / package, source / package, ignore=ignored)
    code = "from setuptools import build_meta; print(build_meta.build_wheel('out'))"
    built = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True, timeout=120)
    assert built.returncode == 0, built.stderr
    with zipfile.ZipFile(source / "out" / built.stdout.splitlines()[-1]) as archive:
        return set(archive.namelist())


@pytest.mark.parametrize("package", PACKAGES)
def test_every_file_of_a_package_is_in(wheel: set[str], package: str) -> None:
    here = {path.relative_to(ROOT).as_posix() for path in (ROOT / package).rglob("*") if path.is_file()}
    assert {path for path in here if "__pycache__" not in path} <= wheel


def test_nothing_else_is_in(wheel: set[str]) -> None:
    assert {name.split("/")[0] for name in wheel if ".dist-info/" not in name} == set(PACKAGES)
