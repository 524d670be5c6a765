"""The engine's counters and gauges as Triton metrics.

Triton's metric objects are not safe to share between threads (two at once can hang or kill the whole server), and a bad
name can abort it. So every name is fixed here, and only the thread of `Publisher` touches the objects.
"""

import re
import threading
from dataclasses import asdict
from typing import Any

from autoglm.llm.engine import EngineStats

PREFIX = "autoglm_"
INTERVAL = 0.5  # seconds between two updates

# Field of EngineStats -> (name, help); the rest of the name says which kind it is.
FAMILIES = {
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
NAME = re.compile(r"[a-z][a-z0-9_]*")


class Publisher:
    """Copies an engine's statistics into Triton's metrics, from one thread of its own."""

    def __init__(self, pb_utils: Any, stats: EngineStats) -> None:
        self._stats = stats
        self._shown: dict[str, float] = dict.fromkeys(FAMILIES, 0)
        self._metrics: dict[str, Any] = {}
        for field, (name, text) in FAMILIES.items():
            if not NAME.fullmatch(name):
                raise ValueError(f"{name} is not a metric name")
            kind = pb_utils.MetricFamily.COUNTER if name.endswith("_total") else pb_utils.MetricFamily.GAUGE
            family = pb_utils.MetricFamily(name=PREFIX + name, description=text, kind=kind)
            self._metrics[field] = (family, family.Metric(labels={}))
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
        for field, value in asdict(self._stats).items():
            if value == self._shown[field]:
                continue
            _, metric = self._metrics[field]
            if FAMILIES[field][0].endswith("_total"):
                metric.increment(value - self._shown[field])
            else:
                metric.set(value)
            self._shown[field] = value
