"""Quantised weights on disk: written at the first start, read at later ones.

An entry is a directory `<root>/<key>` with safetensors shards, `entry.json` (the manifest: contents and file sizes) and
`lock`. It is built as `<root>/<key>.building` and renamed once it is on disk, so a crash never leaves a partial entry.
The lock of a directory is the only coordination between processes. A shared lock means that the entry is in use, until
the process exits; an exclusive lock, that it is being built or removed. The kernel drops the lock when the process
dies. After acquiring it, re-check that the directory is still the current one.
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

FORMAT = 1  # increase when the content of entries changes: tensor names, rounding, file layout
SAMPLES, SAMPLE_BYTES = 64, 4096
BUILDING = ".building"
POLL_S = 0.05
MANIFEST, LOCK = "entry.json", "lock"


class DamagedEntry(Exception):
    """The files of an entry differ from those written."""


@dataclass(frozen=True)
class CacheKey:
    """Identifies an entry by `digest`; `checkpoint` and `settings` describe it to people."""

    digest: str
    checkpoint: str
    settings: Mapping[str, Any]

    @classmethod
    def of(cls, directory: Path, shards: tuple[Path, ...], settings: Mapping[str, Any]) -> "CacheKey":
        """Fingerprint a checkpoint directory and JSON-like `settings`.

        The digest covers FORMAT, the settings, config.json, and of every shard its name, size, modification time in ns,
        header, and SAMPLES pieces of SAMPLE_BYTES spread over its content, including the last bytes. A change between
        these pieces that keeps the size and the modification time is not detected.
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
    """An entry for `autoglm cache list`. size in bytes, last_use in seconds since 1970."""

    path: Path
    checkpoint: str
    settings: Mapping[str, Any]
    size: int
    last_use: float
    in_use: bool


class WeightCache:
    """A directory of entries of at most `max_bytes` in total. Any number of processes may use it concurrently."""

    def __init__(self, root: Path, max_bytes: int) -> None:
        self.root = root
        self.max_bytes = max_bytes
        self._locks: list[int] = []  # shared locks of the entries in use

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
        """Read an entry, or else build its content and write it; returns whether the entry existed.

        Disk errors are logged and cost only the entry: `build` is called nevertheless.

        Args:
            size: approximate number of bytes that `write` writes.
            read: reads the files of a directory; raises DamagedEntry or OSError.
            write: writes the files of a directory; raises OSError.
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
                    time.sleep(POLL_S)  # another process is building it
        except OSError as error:
            log.warning("the weight cache %s cannot be used: %s", self.root, error)
        try:
            build()
            if handle is not None and self._write(key, size, building, write):
                fcntl.flock(handle, fcntl.LOCK_SH)
                self._locks.append(handle)
                handle = None
        finally:
            if handle is not None:
                os.close(handle)
        return False

    def close(self) -> None:
        """Unlock the entries fetched through this object, so that they can be removed."""
        while self._locks:
            os.close(self._locks.pop())

    def entries(self) -> list[Entry]:
        """All entries, least recently used first."""
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
        """Delete an entry unless a process uses it; returns whether it is gone."""
        handle = _lock(path, fcntl.LOCK_EX | fcntl.LOCK_NB, create=True)
        if handle is None and not force:
            return not path.exists()
        # Rename it first, so that a crash while deleting does not leave a partial entry.
        waste = path.with_name(f"{path.name}.{os.getpid()}{BUILDING}")
        with suppress(FileNotFoundError):
            path.rename(waste)
        shutil.rmtree(waste, ignore_errors=True)
        if handle is not None:
            os.close(handle)
        return True

    def _read(self, path: Path, read: Callable[[Path], None]) -> bool:
        if not self._use(path):
            return False
        try:
            _check_files(path)
            read(path)
        except (DamagedEntry, OSError) as error:
            log.warning("entry %s of the weight cache is damaged and will be rebuilt: %s", path.name, error)
            os.close(self._locks.pop())
            self.remove(path, force=True)
            return False
        os.utime(path / LOCK)
        return True

    def _use(self, path: Path) -> bool:
        """Mark an entry as in use until the process exits; returns whether it exists."""
        handle = _lock(path, fcntl.LOCK_SH)
        if handle is not None:
            self._locks.append(handle)
        return handle is not None

    def _write(self, key: CacheKey, size: int, building: Path, write: Callable[[Path], None]) -> bool:
        begin = time.perf_counter()
        try:
            self._make_room(size)
            for file in building.iterdir():  # left by a process that died
                if file.name != LOCK:
                    file.unlink()
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
        """Remove the least recently used entries that are not in use, until `size` more bytes fit."""
        entries = self.entries()
        total = sum(entry.size for entry in entries) + size
        for entry in entries:
            if total <= self.max_bytes:
                break
            if self.remove(entry.path):
                log.info("removed %s (%s) from the weight cache", entry.path.name, entry.checkpoint)
                total -= entry.size
        if total > self.max_bytes:
            raise OSError(f"weight_cache.max_gb must be at least {total / 1e9:.1f} (got {self.max_bytes / 1e9:g})")
        free = shutil.disk_usage(self.root).free
        if free < size:
            raise OSError(f"{self.root} has {free / 1e9:.1f} GB free, but {size / 1e9:.1f} GB are needed")

    def _sweep(self) -> None:
        """Remove the directories of processes that died while building."""
        for building in self.root.glob("*" + BUILDING):
            self.remove(building)


def cache_directory(config: WeightCacheConfig) -> Path:
    named = config.directory or os.environ.get("AUTOGLM_CACHE")
    return Path(named).expanduser() if named else Path.home() / ".cache" / "autoglm" / "weights"


def _lock(directory: Path, how: int, create: bool = False) -> int | None:
    """Lock a directory and return a handle for the caller to close.

    Returns:
        None if the directory does not exist, or (with LOCK_NB) if another process has locked it.
    """
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
        os.close(handle)  # another process removed or renamed the directory meanwhile


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
            raise DamagedEntry(f"{name} must be {size} bytes long")


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
