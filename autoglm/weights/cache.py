"""Quantised weights on disk: written at the first start, read at every later one.

An entry is a directory `<root>/<key>` with safetensors shards, `entry.json` (what it holds, how long each file is)
and `lock`. It is made as `<root>/<key>.building` and renamed when all of it is on the disk, so that a crash leaves
nothing that could be taken for an entry. The one file lock of a directory says all that processes need to know of
each other: shared, the entry is in use, for as long as the process lives; exclusive, it is being made or removed. The
kernel releases it with its process, however that ends. Whoever gets a lock looks whether the directory is still
the one under its name.
"""

import fcntl
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autoglm.config import WeightCacheConfig

log = logging.getLogger(__name__)

FORMAT = 1  # changes with whatever changes the content of entries: names of tensors, rounding, file layout
SAMPLES, SAMPLE_BYTES = 64, 4096
BUILDING = ".building"
POLL_S = 0.05
MANIFEST, LOCK = "entry.json", "lock"


class DamagedEntry(Exception):
    """The files of an entry are not what was written."""


@dataclass(frozen=True)
class CacheKey:
    """What an entry holds: `digest` names it, `checkpoint` and `settings` tell a person."""

    digest: str
    checkpoint: str
    settings: Mapping[str, Any]

    @classmethod
    def of(cls, directory: Path, shards: tuple[Path, ...], settings: Mapping[str, Any]) -> "CacheKey":
        """Fingerprint a checkpoint directory under JSON-like `settings`.

        Covered are: the bytes of config.json; of every shard its name, size, time of change in ns, its whole header
        (names, types and places of its tensors), and SAMPLES pieces of SAMPLE_BYTES spread over its content, the
        last bytes among them; the settings; FORMAT. A change of content that keeps size and time, and happens
        between the pieces, is not noticed.
        """
        digest = hashlib.sha256(json.dumps([FORMAT, settings], sort_keys=True).encode())
        digest.update((directory / "config.json").read_bytes())
        for shard in shards:
            status = shard.stat()
            digest.update(f"{shard.name} {status.st_size} {status.st_mtime_ns}".encode())
            with shard.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                digest.update(file.read(min(length, status.st_size)))
                last = max(0, status.st_size - SAMPLE_BYTES)
                for i in range(SAMPLES):
                    file.seek(last * i // (SAMPLES - 1))
                    digest.update(file.read(SAMPLE_BYTES))
        return cls(digest.hexdigest()[:32], directory.resolve().name, settings)


@dataclass(frozen=True)
class Entry:
    """An entry as `autoglm cache list` shows it. size in bytes, last_use in seconds since 1970."""

    path: Path
    checkpoint: str
    settings: Mapping[str, Any]
    size: int
    last_use: float
    in_use: bool


class WeightCache:
    """A directory of entries, together at most `max_bytes` long. Any number of processes may use it at once."""

    def __init__(self, root: Path, max_bytes: int) -> None:
        self.root = root
        self.max_bytes = max_bytes
        self._held: list[int] = []  # locks of the entries in use; they end with the process

    @classmethod
    def from_config(cls, config: WeightCacheConfig) -> "WeightCache | None":
        return cls(cache_directory(config), config.max_gb * 10**9) if config.enabled else None

    def fetch(
        self,
        key: CacheKey,
        size: int,
        read: Callable[[Path], None],
        build: Callable[[], None],
        write: Callable[[Path], None],
    ) -> bool:
        """Read an entry, or build what it should hold and write it; returns whether it was there.

        Trouble with the disk costs the entry, never the caller: it is logged, and `build` is called all the same.

        Args:
            size: bytes that `write` will take, roughly.
            read: reads the files of a directory; raises DamagedEntry or OSError.
            write: writes files into a directory; raises OSError.
        """
        path, building = self.root / key.digest, self.root / (key.digest + BUILDING)
        handle = None
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            self._sweep()
            while handle is None:
                if self._read(path, read):
                    return True
                building.mkdir(exist_ok=True)
                handle = _lock(building, fcntl.LOCK_EX | fcntl.LOCK_NB, create=True)
                if handle is None:
                    time.sleep(POLL_S)  # another process builds it
        except OSError as error:
            log.warning("the weight cache %s cannot be used: %s", self.root, error)
        try:
            build()
            if handle is not None and self._write(key, size, building, write):
                fcntl.flock(handle, fcntl.LOCK_SH)
                self._held.append(handle)
                handle = None
        finally:
            if handle is not None:
                os.close(handle)
        return False

    def close(self) -> None:
        """Let others remove the entries that this object has fetched."""
        while self._held:
            os.close(self._held.pop())

    def entries(self) -> list[Entry]:
        """What the cache holds, the longest unused first."""
        found = []
        for manifest in self.root.glob(f"*/{MANIFEST}"):
            path = manifest.parent
            if path.suffix == BUILDING:
                continue
            with suppress(OSError, ValueError, LookupError):
                content = json.loads(manifest.read_text())
                used = (path / LOCK).stat().st_mtime
                size = sum(content["files"].values())
                found.append(Entry(path, content["checkpoint"], content["settings"], size, used, _in_use(path)))
        return sorted(found, key=lambda entry: entry.last_use)

    def remove(self, path: Path, force: bool = False) -> bool:
        """Delete an entry, or leave it because a living process uses it; returns whether it is gone."""
        handle = _lock(path, fcntl.LOCK_EX | fcntl.LOCK_NB, create=True)
        if handle is None and not force:
            return not path.exists()
        # Under another name first: a crash in the middle of this must not leave half an entry either.
        waste = path.with_name(f"{path.name}.{os.getpid()}{BUILDING}")
        with suppress(FileNotFoundError):
            path.rename(waste)
        shutil.rmtree(waste, ignore_errors=True)
        if handle is not None:
            os.close(handle)
        return True

    def _read(self, path: Path, read: Callable[[Path], None]) -> bool:
        if not self._hold(path):
            return False
        try:
            _check_files(path)
            read(path)
        except (DamagedEntry, OSError) as error:
            log.warning("the entry %s of the weight cache is damaged and is made anew: %s", path.name, error)
            os.close(self._held.pop())
            self.remove(path, force=True)
            return False
        os.utime(path / LOCK)
        return True

    def _hold(self, path: Path) -> bool:
        """Mark an entry as in use until the process ends; False when there is none."""
        handle = _lock(path, fcntl.LOCK_SH)
        if handle is not None:
            self._held.append(handle)
        return handle is not None

    def _write(self, key: CacheKey, size: int, building: Path, write: Callable[[Path], None]) -> bool:
        begin = time.perf_counter()
        try:
            self._make_room(size)
            for left in building.iterdir():  # by a process that died
                if left.name != LOCK:
                    left.unlink()
            write(building)
            files = {file.name: file.stat().st_size for file in building.iterdir() if file.name != LOCK}
            manifest = {"format": FORMAT, "checkpoint": key.checkpoint, "settings": key.settings, "files": files}
            (building / MANIFEST).write_text(json.dumps(manifest, indent=1))
            for name in (*files, MANIFEST, ""):
                _sync(building / name)
            building.rename(self.root / key.digest)
            _sync(self.root)
        except OSError as error:
            log.warning("the weights could not be written to the cache: %s", error)
            shutil.rmtree(building, ignore_errors=True)
            return False
        log.info("wrote %.1f GB to the weight cache in %.1f s", size / 1e9, time.perf_counter() - begin)
        return True

    def _make_room(self, size: int) -> None:
        """Remove what was used longest ago and is not in use, until `size` more bytes fit."""
        entries = self.entries()
        total = sum(entry.size for entry in entries) + size
        for entry in entries:
            if total <= self.max_bytes:
                break
            if self.remove(entry.path):
                log.info("removed %s (%s) from the weight cache", entry.path.name, entry.checkpoint)
                total -= entry.size
        if total > self.max_bytes:
            raise OSError(f"weight_cache.max_gb is {self.max_bytes / 1e9:g}, {total / 1e9:.1f} are needed and in use")
        free = shutil.disk_usage(self.root).free
        if free < size:
            raise OSError(f"{self.root} has {free / 1e9:.1f} GB free, {size / 1e9:.1f} are needed")

    def _sweep(self) -> None:
        """Remove what processes left behind that died while they built."""
        for building in self.root.glob("*" + BUILDING):
            self.remove(building)


def cache_directory(config: WeightCacheConfig) -> Path:
    named = config.directory or os.environ.get("AUTOGLM_CACHE")
    return Path(named).expanduser() if named else Path.home() / ".cache" / "autoglm" / "weights"


def _lock(directory: Path, how: int, create: bool = False) -> int | None:
    """Lock a directory; None when it is not there, or (with LOCK_NB) when others have it. The caller closes it."""
    while True:
        try:
            handle = os.open(directory / LOCK, os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT if create else 0), 0o644)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(handle, how)
            if os.path.samestat(os.fstat(handle), os.stat(directory / LOCK)):
                return handle
        except FileNotFoundError:
            pass
        except BlockingIOError:
            os.close(handle)
            return None
        os.close(handle)  # while we waited, another process removed or renamed the directory


def _in_use(path: Path) -> bool:
    handle = _lock(path, fcntl.LOCK_EX | fcntl.LOCK_NB)
    if handle is None:
        return path.exists()
    os.close(handle)
    return False


def _check_files(path: Path) -> None:
    try:
        files = dict(json.loads((path / MANIFEST).read_text())["files"])
    except (ValueError, LookupError, TypeError):
        raise DamagedEntry(f"{MANIFEST} cannot be read") from None
    for name, size in files.items():
        if (path / name).stat().st_size != size:
            raise DamagedEntry(f"{name} is not {size} bytes long")


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
