"""Statistics of the engine and of the encoders' caches as Triton metrics.

Triton's metric objects are not thread safe (concurrent use can hang or kill the server), and an invalid name can abort
it. So all names are constants here, and only the thread of `MetricsPublisher` uses the objects.
"""

import re
import threading
from collections.abc import Mapping
from typing import Any

PREFIX = "autoglm_"
UPDATE_INTERVAL_S = 0.5

# Field of EngineStats -> (name, help). A name that ends in _total is a counter, any other a gauge.
ENGINE = {
    "requests": ("requests_total", "Requests accepted by the engine"),
    "prompt_tokens": ("prompt_tokens_total", "Prompt tokens, including cached ones"),
    "cached_tokens": ("prefix_cache_hit_tokens_total", "Prompt tokens found in the prefix cache"),
    "generated_tokens": ("generated_tokens_total", "Generated tokens"),
    "steps": ("steps_total", "Forward passes of the language model"),
    "running": ("requests_running", "Requests in the running batch"),
    "waiting": ("requests_waiting", "Requests waiting to be scheduled"),
    "blocks_total": ("kv_blocks", "KV blocks"),
    "blocks_held": ("kv_blocks_held", "KV blocks referenced by running requests"),
    "blocks_cached": ("kv_blocks_cached", "Evictable cached KV blocks"),
}
# Field of CacheStats, likewise.
VISION_CACHE = {
    "hits": ("vision_cache_hits_total", "Image cache hits, including requests that joined an encoding in progress"),
    "misses": ("vision_cache_misses_total", "Images encoded"),
    "evictions": ("vision_cache_evictions_total", "Images evicted from the cache"),
    "entries": ("vision_cache_entries", "Images in the cache"),
    "bytes": ("vision_cache_bytes", "Device memory used by the cache"),
    "host_bytes": ("vision_cache_host_bytes", "Pinned host memory used by the cache"),
}
AUDIO_CACHE = {
    "hits": ("audio_cache_hits_total", "Clip cache hits, including requests that joined an encoding in progress"),
    "misses": ("audio_cache_misses_total", "Clips encoded"),
    "evictions": ("audio_cache_evictions_total", "Clips evicted from the cache"),
    "entries": ("audio_cache_entries", "Clips in the cache"),
    "bytes": ("audio_cache_bytes", "Memory used by the cache"),
}
NAME = re.compile(r"[a-z][a-z0-9_]*")


class MetricsPublisher:
    """Copies statistics to Triton's metrics periodically, in a separate thread."""

    def __init__(
        self,
        pb_utils: Any,
        stats: object,
        families: Mapping[str, tuple[str, str]],
        labels: Mapping[str, str] | None = None,
    ) -> None:
        """
        Args:
            stats: its attributes are the values; other threads update them.
            families: (name, help) by attribute of `stats`.
            labels: distinguish the processes that publish the same names.
        """
        self._stats = stats
        self._families = families
        self._published: dict[str, float] = dict.fromkeys(families, 0)
        self._metrics: dict[str, Any] = {}
        for field, (name, text) in families.items():
            if not NAME.fullmatch(name):
                raise ValueError(f"{name} is not a metric name")
            kind = pb_utils.MetricFamily.COUNTER if name.endswith("_total") else pb_utils.MetricFamily.GAUGE
            family = pb_utils.MetricFamily(name=PREFIX + name, description=text, kind=kind)
            self._metrics[field] = (family, family.Metric(labels=dict(labels or {})))
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopped.wait(UPDATE_INTERVAL_S):
            self._update()

    def _update(self) -> None:
        for field, (name, _) in self._families.items():
            value = getattr(self._stats, field)
            if value == self._published[field]:
                continue
            _, metric = self._metrics[field]
            if name.endswith("_total"):
                metric.increment(value - self._published[field])
            else:
                metric.set(value)
            self._published[field] = value
