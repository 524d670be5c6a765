"""Limits that keep the code readable: length of files, and of lists of positional arguments."""

import ast
import subprocess
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
MAX_LINES = 400
MAX_POSITIONAL = 6


def python_files() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return [path for name in listed.stdout.split() if (path := ROOT / name).is_file()]


def test_no_file_is_longer_than_400_lines() -> None:
    files = python_files()
    assert len(files) > 300
    assert [path for path in files if len(path.read_text(encoding="utf-8").splitlines()) > MAX_LINES] == []


def test_no_function_takes_more_than_six_positional_arguments() -> None:
    assert [where for path in python_files() for where in long_signatures(path)] == []


def long_signatures(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if any("triton.jit" in ast.unparse(decorator) for decorator in node.decorator_list):
            continue
        names = [argument.arg for argument in node.args.posonlyargs + node.args.args]
        if names[:1] in (["self"], ["cls"]):
            del names[0]
        if len(names) > MAX_POSITIONAL:
            yield f"{path.relative_to(ROOT)}:{node.lineno} {node.name}({', '.join(names)})"
