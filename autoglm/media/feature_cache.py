"""An LRU cache of encoded features, in two tiers: device memory, and pinned host memory for entries evicted from it.

A hit in the host tier moves the entry back to the device. On the CPU both tiers are ordinary memory.

Entries are immutable, and eviction only drops a reference. All of a cache's work on its device must be on one stream:
copies are asynchronous, and only the stream's order keeps them from reading unwritten memory, and the allocators from
reusing memory that is still read.
"""

import threading
from collections import OrderedDict
from concurrent.futures import Future
from dataclasses import dataclass

import torch

from autoglm.errors import RequestError


@dataclass
class CacheStats:
    """Totals since start-up, and the current size."""

    hits: int = 0  # including claims that joined an encoding in progress
    misses: int = 0
    evictions: int = 0  # from both tiers
    entries: int = 0
    bytes: int = 0  # on the device
    host_bytes: int = 0


class _Tier:
    """An LRU map of tensors of at most `limit` bytes in total."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0
        self.entries: OrderedDict[str, torch.Tensor] = OrderedDict()

    def get(self, key: str) -> torch.Tensor | None:
        """Look up a tensor and mark it as the most recently used."""
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
        """Insert a tensor as the most recently used; returns the evicted ones."""
        self.pop(key)
        self.entries[key] = features
        self.used += _size(features)
        evicted = []
        while self.used > self.limit:
            oldest, tensor = self.entries.popitem(last=False)
            self.used -= _size(tensor)
            evicted.append((oldest, tensor))
        return evicted


class FeatureCache:
    """Thread-safe.

    Args:
        device_bytes, host_bytes: sizes of the tiers; 0 disables one.
    """

    def __init__(self, device: torch.device, device_bytes: int, host_bytes: int = 0) -> None:
        self.device = device
        self.stats = CacheStats()
        self._device = _Tier(device_bytes)
        self._host = _Tier(host_bytes)
        self._claims: dict[str, Future[torch.Tensor]] = {}
        self._lock = threading.Lock()

    def claim(self, key: str) -> tuple[Future[torch.Tensor], bool]:
        """A future of the features under `key`, and whether the caller must encode them.

        If so, the caller resolves the claim by `put` or `fail`; until then all other claims of the key share its
        future. To avoid deadlock, resolve all your claims before waiting on others'.
        """
        with self._lock:
            future = self._claims.get(key)
            if future is None:
                future = Future()
                features = self._find(key)
                if features is None:
                    self.stats.misses += 1
                    self._claims[key] = future
                    return future, True
                future.set_result(features)
            self.stats.hits += 1
            return future, False

    def put(self, key: str, features: torch.Tensor) -> None:
        """Resolve a claim with features on the device, in their own storage, which must not be written any more."""
        with self._lock:
            self._store(key, features)
            future = self._claims.pop(key)
        future.set_result(features)

    def fail(self, key: str, error: RequestError) -> None:
        """Resolve a claim with an error, which is not cached."""
        with self._lock:
            future = self._claims.pop(key)
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
        # An entry larger than a tier must not evict all others.
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
    """The allocated size: torch's allocator of pinned memory rounds up to powers of two."""
    return int(1 << (features.nbytes - 1).bit_length())


def _to_host(features: torch.Tensor) -> torch.Tensor:
    storage = torch.empty(_pinned_size(features), dtype=torch.uint8, pin_memory=features.is_cuda)
    stored = storage[: features.nbytes].view(features.dtype).view(features.shape)
    return stored.copy_(features, non_blocking=True)
