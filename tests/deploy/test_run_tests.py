"""run_tests.sh with stand-ins for the programs that it runs."""

import shutil
import subprocess
from pathlib import Path

import pytest

from autoglm_launcher import ROOT

STAND_IN = '#!/bin/sh\n[ "$1" = -c ] || echo "$(basename "$0")" "$@"\n'


@pytest.mark.parametrize(
    ("arguments", "programs"),
    [
        ([], ["lint-imports --no-logo", "python -m pytest"]),
        (
            ["--fast"],
            ["lint-imports --no-logo", "python -m pytest -m not tritonserver and not browser -n auto --dist worksteal"],
        ),
        (["--coverage", "-x"], ["lint-imports --no-logo", "python -m pytest --cov -x"]),
        (
            ["--fast", "tests/llm"],
            ["python -m pytest -m not tritonserver and not browser -n auto --dist worksteal tests/llm"],
        ),
        (["-k", "chat"], ["python -m pytest -k chat"]),
    ],
)
def test_runs_import_linter_and_pytest(tmp_path: Path, arguments: list[str], programs: list[str]) -> None:
    shutil.copy(ROOT / "run_tests.sh", tmp_path)
    (tmp_path / "autoglm_launcher").mkdir()
    (tmp_path / "autoglm_launcher" / "find_python.sh").write_text("PYTHON=.venv/bin/python\n")
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    for name in ("python", "lint-imports"):
        program = tmp_path / ".venv" / "bin" / name
        program.write_text(STAND_IN)
        program.chmod(0o755)
    ran = subprocess.run([tmp_path / "run_tests.sh", *arguments], capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines() == ["python -m autoglm_launcher.venv test loadtest gateway", *programs]
