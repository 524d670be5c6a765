"""The installed command `autoglm cache`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from autoglm_client.cli import main

from autoglm.weights.cache import CacheKey, WeightCache
from autoglm.weights.safetensors import write_tensors

Output = pytest.CaptureFixture[str]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WeightCache:
    """Entries "aaaa" and "bbbb" in the environment's directory, both in use by this object."""
    monkeypatch.setenv("AUTOGLM_CACHE", str(tmp_path / "weights"))
    monkeypatch.delenv("AUTOGLM_CONFIG", raising=False)
    made = WeightCache(tmp_path / "weights", 10**6)
    for name in ("aaaa", "bbbb"):
        key = CacheKey(name, "demo", {"head": True})
        tensors = {"x": torch.zeros(1000)}
        made.fetch(key, 4000, lambda path: None, lambda: None, lambda path, t=tensors: write_tensors(path, t))  # type: ignore[misc]
    return made


def test_list(cache: WeightCache, capsys: Output) -> None:
    assert main(["cache", "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[0] == "aaaa"
    assert lines[0].endswith("in use  demo")
    assert lines[1].strip() == '{"head": true}'
    assert lines[-1] == f"2 entries, 0.00 GB in {cache.root}"
    cache.close()
    assert main(["cache", "list", "--json"]) == 0
    entries = json.loads(capsys.readouterr().out)
    assert [(entry["key"], entry["in_use"]) for entry in entries] == [("aaaa", False), ("bbbb", False)]
    assert entries[0]["bytes"] > 4000


def test_clear_keeps_entries_in_use(cache: WeightCache, capsys: Output) -> None:
    assert main(["cache", "clear"]) == 1
    output = capsys.readouterr()
    assert output.out == "deleted 0 entries, 0.00 GB\n"
    assert output.err == "autoglm: not deleted, in use: aaaa, bbbb (--force deletes them too)\n"
    assert main(["cache", "clear", "a", "--force"]) == 0
    assert [entry.path.name for entry in cache.entries()] == ["bbbb"]
    cache.close()
    assert main(["cache", "clear"]) == 0
    assert cache.entries() == []
    assert main(["cache", "clear", "zz"]) == 1
    assert "no entry zz" in capsys.readouterr().err


def test_the_directory_comes_from_the_configuration(
    tmp_path: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(f"weight_cache: {{directory: {tmp_path / 'there'}}}")
    monkeypatch.setenv("AUTOGLM_CONFIG", str(file))
    assert main(["cache", "list"]) == 0
    assert capsys.readouterr().out == f"0 entries, 0.00 GB in {tmp_path / 'there'}\n"
    file.write_text("weight_cache: 1")
    assert main(["cache", "list"]) == 1
    assert "weight_cache must be a section (got 1)" in capsys.readouterr().err


def test_the_installed_command(tmp_path: Path) -> None:
    script = Path(sys.executable).parent / "autoglm"
    command = [str(script), "cache", "list", "--directory", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout) == (0, f"0 entries, 0.00 GB in {tmp_path}\n")


def test_torch_is_not_imported() -> None:
    code = "import sys, autoglm.weights.command; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
