"""Embeddings of images that were encoded before; what was used longest ago goes first.

Two tiers: the device's memory, and pinned host memory for what no longer fits there. What is found in the host's moves
back to the device. On the CPU both are the same memory.

Entries are immutable, and leaving the cache only drops a reference. All of a cache's work on its device must be on one
stream: copies are asynchronous, and the stream's order alone keeps them from reading what is not yet written, and the
allocators from giving memory away that is still read.
"""

import threading
from collections import OrderedDict
from concurrent.futures import Future
from dataclasses import dataclass

import torch

from autoglm.errors import RequestError


@dataclass
class CacheStats:
    """Totals since the start, and what is held."""

    hits: int = 0  # images that need not be encoded; also when another request is encoding the same just now
    misses: int = 0
    evictions: int = 0  # entries that left both tiers
    entries: int = 0
    bytes: int = 0  # on the device
    host_bytes: int = 0


class _Tier:
    """Tensors of at most `limit` bytes together."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0
        self.entries: OrderedDict[str, torch.Tensor] = OrderedDict()

    def get(self, key: str) -> torch.Tensor | None:
        """The tensor under `key`, which is now the last that was used."""
        if key not in self.entries:
            return None
        self.entries.move_to_end(key)
        return self.entries[key]

    def pop(self, key: str) -> torch.Tensor | None:
        features = self.entries.pop(key, None)
        if features is not None:
            self.used -= _size(features)
        return features

    def add(self, key: str, features: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
        """Put in a tensor as the last that was used; returns what had to leave for it."""
        self.pop(key)
        self.entries[key] = features
        self.used += _size(features)
        left = []
        while self.used > self.limit:
            oldest, tensor = self.entries.popitem(last=False)
            self.used -= _size(tensor)
            left.append((oldest, tensor))
        return left


class FeatureCache:
    """Safe for several threads."""

    def __init__(self, device: torch.device, device_bytes: int, host_bytes: int = 0) -> None:
        """The tiers may take so many bytes; 0 is none."""
        self.device = device
        self.stats = CacheStats()
        self._device = _Tier(device_bytes)
        self._host = _Tier(host_bytes)
        self._awaited: dict[str, Future[torch.Tensor]] = {}
        self._lock = threading.Lock()

    def claim(self, key: str) -> tuple[Future[torch.Tensor], bool]:
        """The features under `key`, and whether it is the caller who must encode them.

        Whoever must, ends it with `put` or `fail`; until then all others who ask for the same key share the future.
        To be free of deadlocks, end all that is yours before you wait for anything.
        """
        with self._lock:
            future = self._awaited.get(key)
            if future is None:
                future = Future()
                features = self._find(key)
                if features is None:
                    self.stats.misses += 1
                    self._awaited[key] = future
                    return future, True
                future.set_result(features)
            self.stats.hits += 1
            return future, False

    def put(self, key: str, features: torch.Tensor) -> None:
        """Answer a claim with features on the device, in a storage of their own, which nobody writes any more."""
        with self._lock:
            self._store(key, features)
            future = self._awaited.pop(key)
        future.set_result(features)

    def fail(self, key: str, error: RequestError) -> None:
        """Answer a claim with an error, which is not kept."""
        with self._lock:
            future = self._awaited.pop(key)
        future.set_exception(error)

    def _find(self, key: str) -> torch.Tensor | None:
        features = self._device.get(key)
        if features is None:
            stored = self._host.pop(key)
            if stored is not None:
                features = stored.to(self.device, non_blocking=True)
                self._store(key, features)
        return features

    def _store(self, key: str, features: torch.Tensor) -> None:
        # One that no tier could hold must not drive out all others.
        if _size(features) <= self._device.limit:
            for old, tensor in self._device.add(key, features):
                self._store_on_host(old, tensor)
        else:
            self._store_on_host(key, features)
        self.stats.entries = len(self._device.entries) + len(self._host.entries)
        self.stats.bytes, self.stats.host_bytes = self._device.used, self._host.used

    def _store_on_host(self, key: str, features: torch.Tensor) -> None:
        if _pinned_size(features) <= self._host.limit:
            self.stats.evictions += len(self._host.add(key, _to_host(features)))
        elif _size(features) <= self._device.limit:
            self.stats.evictions += 1


def _size(features: torch.Tensor) -> int:
    return features.untyped_storage().nbytes()


def _pinned_size(features: torch.Tensor) -> int:
    """torch's allocator of pinned memory takes powers of two: counting less would break the bound."""
    return int(1 << (features.nbytes - 1).bit_length())


def _to_host(features: torch.Tensor) -> torch.Tensor:
    storage = torch.empty(_pinned_size(features), dtype=torch.uint8, pin_memory=features.is_cuda)
    stored = storage[: features.nbytes].view(features.dtype).view(features.shape)
    return stored.copy_(features, non_blocking=True)
