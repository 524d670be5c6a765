"""constraints/ pins every requirement to a version that fits, and the installed versions are the pinned ones."""

import re
import sys
import sysconfig
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from autoglm_launcher import ROOT
from autoglm_launcher.venv import SUPPORTED, VENV

PROJECTS = ("autoglm-triton", "autoglm-client")
# Not pinned: pip, and the CUDA packages that torch pins.
NOT_PINNED = re.compile(r"pip|setuptools|wheel|(nvidia|cuda)-.+")

pytestmark = pytest.mark.skipif(Path(sys.prefix) != VENV, reason="does not run in .venv")


def pins(version: str) -> dict[str, str]:
    text = (ROOT / "constraints" / f"py{version.replace('.', '')}.txt").read_text()
    return dict(line.split("==") for line in text.splitlines())


@pytest.mark.parametrize("version", SUPPORTED)
def test_a_line_is_a_name_and_an_exact_version(version: str) -> None:
    text = (ROOT / "constraints" / f"py{version.replace('.', '')}.txt").read_text()
    assert re.fullmatch(r"([a-z0-9-]+==[a-z0-9.]+\n)+", text)


@pytest.mark.parametrize("version", SUPPORTED)
def test_every_requirement_and_extra_has_a_version_that_fits(version: str) -> None:
    for requirement in [Requirement(text) for project in PROJECTS for text in metadata.requires(project) or []]:
        pinned = pins(version).get(canonicalize_name(requirement.name))
        assert pinned, f"{requirement}: run constraints/update.sh"
        assert requirement.specifier.contains(pinned), f"{requirement}, not {pinned}: run constraints/update.sh"


def test_the_installed_versions_are_the_pinned_ones() -> None:
    pinned = pins(f"3.{sys.version_info.minor}")
    for distribution in metadata.distributions(path=[sysconfig.get_path("purelib")]):
        name = canonicalize_name(distribution.metadata["Name"])
        if name in pinned:
            assert distribution.version.split("+")[0] == pinned[name], f"{name}: run ./run_tests.sh, which installs it"
        else:
            assert name in PROJECTS or NOT_PINNED.fullmatch(name), f"{name} is in no constraints file"
