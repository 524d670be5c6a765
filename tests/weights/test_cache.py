"""The weight cache, with real files and real processes."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from autoglm.weights import safetensors as safetensors_module
from autoglm.weights.cache import BUILDING, CacheKey, WeightCache
from autoglm.weights.safetensors import read_tensors, write_tensors

Tensors = dict[str, torch.Tensor]


def key(name: str) -> CacheKey:
    return CacheKey(name * 8, "demo", {"head": True})


def make(value: float = 1.0) -> Tensors:
    return {"a.values": torch.full((50, 40), value).to(torch.int8), "a.scales": torch.full((50, 1), value / 3)}


def fetch(cache: WeightCache, name: str, tensors: Tensors, build: Callable[[], None] = lambda: None) -> bool:
    size = sum(tensor.nbytes for tensor in tensors.values())
    return cache.fetch(
        key(name), size, lambda path: read_tensors(path, tensors), build, lambda path: write_tensors(path, tensors)
    )


# A separate process: builds or reads an entry, prints which, and keeps using it if `how` is "stay".
PROCESS = """
import sys, time, torch
from pathlib import Path
from autoglm.weights.cache import CacheKey, WeightCache
from autoglm.weights.safetensors import read_tensors, write_tensors

root, name, how = sys.argv[1:]
tensors = {"a.values": torch.zeros(50, 40, dtype=torch.int8), "a.scales": torch.zeros(50, 1)}

def build():
    print("build", flush=True)
    time.sleep(0.3)
    tensors["a.values"].fill_(7)

def write(path):
    write_tensors(path, tensors)
    if how == "hang":
        print("hanging", flush=True)
        time.sleep(60)

key = CacheKey(name * 8, "demo", {})
found = WeightCache(Path(root), 10**6).fetch(key, 2200, lambda path: read_tensors(path, tensors), build, write)
print(found, int(tensors["a.values"][0, 0]), flush=True)
if how == "stay":
    time.sleep(60)
"""


@pytest.fixture
def start(tmp_path: Path) -> object:
    started = []

    def run(name: str, how: str = "leave") -> "subprocess.Popen[str]":
        command = [sys.executable, "-c", PROCESS, str(tmp_path), name, how]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]))
        return started[-1]

    yield run
    for process in started:
        process.kill()
        process.wait()


Start = Callable[..., "subprocess.Popen[str]"]


def line(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_an_entry_is_written_once_and_then_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safetensors_module, "SHARD_BYTES", 1500)
    monkeypatch.setattr(safetensors_module, "PIECE_BYTES", 777)
    written = make(5) | {"table": torch.randn(700).bfloat16(), "none": torch.empty(0, 4)}
    assert not fetch(WeightCache(tmp_path, 10**6), "k", written)
    (entry,) = WeightCache(tmp_path, 10**6).entries()
    assert len(list(entry.path.glob("*.safetensors"))) == 3
    read = {name: torch.zeros_like(tensor) for name, tensor in written.items()}
    assert fetch(WeightCache(tmp_path, 10**6), "k", read)
    assert all(torch.equal(read[name], tensor) for name, tensor in written.items())
    assert (entry.checkpoint, entry.settings) == ("demo", {"head": True})
    assert entry.size == sum(file.stat().st_size for file in entry.path.glob("*.safetensors"))


def test_of_two_processes_one_builds_and_one_reads(start: Start, tmp_path: Path) -> None:
    both = [start("k"), start("k")]
    output = [process.communicate(timeout=30)[0].split("\n") for process in both]
    assert sorted(output) == [["True 7", ""], ["build", "False 7", ""]]
    assert [path.name for path in tmp_path.iterdir()] == ["k" * 8]


def test_a_process_killed_while_writing_leaves_no_entry(start: Start, tmp_path: Path) -> None:
    first = start("k", "hang")
    assert (line(first), line(first)) == ("build", "hanging")
    waiting = start("k")
    time.sleep(0.2)
    assert WeightCache(tmp_path, 10**6).entries() == []
    other = WeightCache(tmp_path, 10**6)
    fetch(other, "o", make())
    assert (tmp_path / ("k" * 8 + BUILDING)).exists(), "it is still being built"
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert waiting.communicate(timeout=30)[0] == "build\nFalse 7\n"
    assert len(other.entries()) == 2


def test_the_directory_of_a_dead_process_is_removed(start: Start, tmp_path: Path) -> None:
    first = start("k", "hang")
    assert (line(first), line(first)) == ("build", "hanging")
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert not fetch(WeightCache(tmp_path, 10**6), "o", make())
    assert [path.name for path in tmp_path.iterdir()] == ["o" * 8]


def truncate(entry: Path) -> None:
    os.truncate(next(entry.glob("*.safetensors")), 900)


def cut_manifest(entry: Path) -> None:
    (entry / "entry.json").write_text('{"files"')


def drop_shard(entry: Path) -> None:
    next(entry.glob("*.safetensors")).unlink()


def break_header(entry: Path) -> None:
    with next(entry.glob("*.safetensors")).open("r+b") as file:
        file.seek(12)
        file.write(b"\xff\xff")


def other_tensors(entry: Path) -> None:
    write_tensors(entry, {"b": torch.zeros(2)})
    (entry / "entry.json").write_text('{"files": {}}')


@pytest.mark.parametrize("damage", [truncate, cut_manifest, drop_shard, break_header, other_tensors])
def test_a_damaged_entry_is_rebuilt(
    tmp_path: Path, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    fetch(WeightCache(tmp_path, 10**6), "k", make(3))
    damage(tmp_path / ("k" * 8))
    tensors = make(4)

    def build() -> None:
        tensors["a.values"].fill_(9)

    assert not fetch(WeightCache(tmp_path, 10**6), "k", tensors, build)
    assert "is damaged and will be rebuilt" in caplog.text
    again = make(0)
    assert fetch(WeightCache(tmp_path, 10**6), "k", again)
    assert (again["a.values"] == 9).all()


def test_a_full_cache_removes_the_least_recently_used_entry_not_in_use(start: Start, tmp_path: Path) -> None:
    cache = WeightCache(tmp_path, 3 * 2500)
    held = start("a", "stay")
    assert (line(held), line(held)) == ("build", "False 7")
    ours = WeightCache(tmp_path, 10**6)
    for age, name in ((50, "b"), (100, "c")):
        fetch(ours, name, make())
        used = time.time() - age
        os.utime(tmp_path / (name * 8) / "lock", (used, used))
    os.utime(tmp_path / ("a" * 8) / "lock", (0, 0))
    assert [(entry.path.name[0], entry.in_use) for entry in cache.entries()] == [("a", True), ("c", True), ("b", True)]
    ours.close()
    assert [entry.in_use for entry in cache.entries()] == [True, False, False]
    fetch(cache, "d", make())
    assert sorted(path.name[0] for path in tmp_path.iterdir()) == ["a", "b", "d"]
    held.kill()
    held.wait()
    fetch(cache, "e", make())
    assert sorted(path.name[0] for path in tmp_path.iterdir()) == ["b", "d", "e"]


def test_an_entry_larger_than_the_cache_is_not_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    built = []
    assert not fetch(WeightCache(tmp_path, 1000), "k", make(), lambda: built.append(1))
    assert built
    assert "could not be written to the cache" in caplog.text
    assert list(tmp_path.iterdir()) == []


def test_disk_errors_are_warnings(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def full(path: Path) -> None:
        (path / "half").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    built = []
    assert not WeightCache(tmp_path, 10**6).fetch(key("k"), 1, lambda path: None, lambda: built.append(1), full)
    assert "No space left on device" in caplog.text
    assert list(tmp_path.iterdir()) == []
    file = tmp_path / "file"
    file.write_text("")
    assert not fetch(WeightCache(file, 10**6), "k", make(), lambda: built.append(2))
    assert "cannot be used" in caplog.text
    assert built == [1, 2]


def test_an_error_while_building_leaves_no_entry(tmp_path: Path) -> None:
    cache = WeightCache(tmp_path, 10**6)

    def fail() -> None:
        raise RuntimeError("no such weights")

    with pytest.raises(RuntimeError, match="no such weights"):
        fetch(cache, "k", make(), fail)
    assert cache.entries() == []
    assert not fetch(cache, "k", make())
    assert len(cache.entries()) == 1


def test_an_entry_in_use_is_only_removed_by_force(tmp_path: Path) -> None:
    fetch(WeightCache(tmp_path, 10**6), "k", make())
    cache = WeightCache(tmp_path, 10**6)
    (entry,) = cache.entries()
    assert entry.in_use
    assert not cache.remove(entry.path)
    assert cache.remove(entry.path, force=True)
    assert list(tmp_path.iterdir()) == []
    assert cache.remove(entry.path)


def test_the_fingerprint_depends_on_content_and_settings(tmp_path: Path) -> None:
    shard = tmp_path / "model.safetensors"
    (tmp_path / "config.json").write_text("{}")
    write_tensors(tmp_path, {"a": torch.zeros(100_000)})
    (tmp_path / "00000.safetensors").rename(shard)

    def digest(settings: int = 0) -> str:
        return CacheKey.of(tmp_path, (shard,), {"s": settings}).digest

    first, status = digest(), shard.stat()
    assert digest() == first
    assert digest(1) != first
    content = bytearray(shard.read_bytes())
    content[-1] = 1  # in the last piece; size and time stay the same
    shard.write_bytes(content)
    os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns))
    second = digest()
    assert second != first
    os.utime(shard)
    third = digest()
    assert third not in (first, second)
    (tmp_path / "config.json").write_text("{ }")
    assert digest() != third
