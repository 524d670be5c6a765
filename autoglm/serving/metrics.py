"""Counters and gauges of the engine and of the encoders' caches as Triton metrics.

Triton's metric objects are not safe to share between threads (two at once can hang or kill the whole server), and a bad
name can abort it. So every name is fixed here, and only the thread of `Publisher` touches the objects.
"""

import re
import threading
from collections.abc import Mapping
from typing import Any

PREFIX = "autoglm_"
INTERVAL = 0.5  # seconds between two updates

# Field of EngineStats -> (name, help); the end of the name says which kind it is.
ENGINE = {
    "requests": ("requests_total", "Requests taken in by the engine"),
    "prompt_tokens": ("prompt_tokens_total", "Tokens of prompts, cached ones included"),
    "cached_tokens": ("prefix_cache_hit_tokens_total", "Tokens of prompts that the prefix cache already held"),
    "generated_tokens": ("generated_tokens_total", "Tokens sampled"),
    "steps": ("steps_total", "Forward passes of the language model"),
    "running": ("requests_running", "Requests in the current batch"),
    "waiting": ("requests_waiting", "Requests that wait for room"),
    "blocks_total": ("kv_blocks", "Blocks of the KV cache"),
    "blocks_held": ("kv_blocks_held", "Blocks that running requests hold"),
    "blocks_cached": ("kv_blocks_cached", "Blocks that nobody holds and whose content is kept"),
}
# The same for CacheStats.
VISION_CACHE = {
    "hits": ("vision_cache_hits_total", "Images whose embeddings were known, or were being made for another request"),
    "misses": ("vision_cache_misses_total", "Images that were encoded"),
    "evictions": ("vision_cache_evictions_total", "Embeddings dropped because the cache was full"),
    "entries": ("vision_cache_entries", "Images whose embeddings are kept"),
    "bytes": ("vision_cache_bytes", "Memory of the device that they take"),
    "host_bytes": ("vision_cache_host_bytes", "Pinned host memory that they take"),
}
AUDIO_CACHE = {
    "hits": ("audio_cache_hits_total", "Clips whose embeddings or transcripts were known, or were just being made"),
    "misses": ("audio_cache_misses_total", "Clips that were encoded"),
    "evictions": ("audio_cache_evictions_total", "Embeddings and transcripts dropped because the cache was full"),
    "entries": ("audio_cache_entries", "Clips whose embeddings or transcripts are kept"),
    "bytes": ("audio_cache_bytes", "Memory that they take"),
}
NAME = re.compile(r"[a-z][a-z0-9_]*")


class Publisher:
    """Copies statistics into Triton's metrics, from one thread of its own."""

    def __init__(
        self,
        pb_utils: Any,
        stats: object,
        families: Mapping[str, tuple[str, str]],
        labels: Mapping[str, str] | None = None,
    ) -> None:
        """
        Args:
            stats: its attributes are the numbers, which other threads go on changing.
            families: (name, help) by attribute of `stats`.
            labels: tell apart what several processes publish under one name.
        """
        self._stats = stats
        self._families = families
        self._shown: dict[str, float] = dict.fromkeys(families, 0)
        self._metrics: dict[str, Any] = {}
        for field, (name, text) in families.items():
            if not NAME.fullmatch(name):
                raise ValueError(f"{name} is not a metric name")
            kind = pb_utils.MetricFamily.COUNTER if name.endswith("_total") else pb_utils.MetricFamily.GAUGE
            family = pb_utils.MetricFamily(name=PREFIX + name, description=text, kind=kind)
            self._metrics[field] = (family, family.Metric(labels=dict(labels or {})))
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._work, name="metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._stopped.set()
        self._thread.join()

    def _work(self) -> None:
        while not self._stopped.wait(INTERVAL):
            self._update()

    def _update(self) -> None:
        for field, (name, _) in self._families.items():
            value = getattr(self._stats, field)
            if value == self._shown[field]:
                continue
            _, metric = self._metrics[field]
            if name.endswith("_total"):
                metric.increment(value - self._shown[field])
            else:
                metric.set(value)
            self._shown[field] = value
