"""The command line of the gateway."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from gateway import __main__ as command


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, dict[str, Any]]]:
    """The applications that were served, with the options of uvicorn."""
    calls: list[tuple[Any, dict[str, Any]]] = []
    monkeypatch.setattr(uvicorn, "run", lambda app, **options: calls.append((app, options)))
    monkeypatch.setattr(command, "retain_freed_memory", lambda: None)
    return calls


def test_options(served: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "keys").write_text("key")
    assert command.main(["--host", "0.0.0.0", "--port", "1234", "--keys", str(tmp_path / "keys")]) == 0
    [(app, options)] = served
    assert (options["host"], options["port"]) == ("0.0.0.0", 1234)
    assert "securitySchemes" in app.openapi()["components"]
    monkeypatch.setenv("AUTOGLM_API_KEYS", str(tmp_path / "keys"))
    assert command.main([]) == 0
    assert "securitySchemes" in served[-1][0].openapi()["components"]
    assert (served[-1][1]["host"], served[-1][1]["port"]) == ("127.0.0.1", 8080)


@pytest.mark.parametrize("content", [None, "# no key\n"])
def test_a_file_of_keys_that_cannot_be_used(
    served: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None
) -> None:
    keys = tmp_path / "keys"
    if content is not None:
        keys.write_text(content)
    assert command.main(["--keys", str(keys)]) == 1
    assert served == []
    message = capsys.readouterr().err
    assert message.startswith("gateway: ") and str(keys) in message


def test_help_names_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["--help"])
    text = capsys.readouterr().out
    assert all(word in text for word in ("--triton", "--host", "--port", "--keys", "AUTOGLM_API_KEYS"))


def test_the_gateway_does_not_load_torch() -> None:
    program = "import sys, gateway.app; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
