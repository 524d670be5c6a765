"""The memory of a process: how much it may take, what took it, and what is left for the KV cache.

On a GPU the numbers are those of torch's allocator; CUDA's own context comes on top of them. On the CPU they are the
resident set's, and nothing is bounded.
"""

import os
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from autoglm.config import ConfigError, MemoryConfig

MIB = 2**20
MARGIN = 512 * MIB  # fragments between allocations, kernels' code, the graphs' descriptions
CPU_KV_CACHE = 4096 * MIB


@dataclass(frozen=True)
class Stage:
    """What one stage of the start did, in bytes. held: by the allocator, whether in use or not."""

    name: str
    before: int
    after: int
    peak: int
    held: int
    seconds: float


class MemoryManager:
    """Made once in a process, before it puts anything on its device."""

    def __init__(self, config: MemoryConfig, device: torch.device) -> None:
        """Bounds the process and its allocator, and sets what only inference may set."""
        self.device = device
        self.stages: list[Stage] = []
        self.total = _total(device)
        self.budget = min(config.limit_mb * MIB or int(config.fraction * self.total), self.total)
        torch.backends.cudnn.benchmark = False  # screenshots come in many shapes: each would be timed anew
        torch.backends.cudnn.allow_tf32 = False  # float32 is asked for by those who mean it
        if device.type == "cuda":
            # Prompts of all lengths would leave gaps between segments of fixed size. (Such memory cannot be handed
            # to other processes: not for the vision encoder.)
            torch._C._accelerator_setAllocatorSettings("expandable_segments:True")
            torch.cuda.set_per_process_memory_fraction(self.budget / self.total, device)

    @contextmanager
    def tag(self, name: str) -> Iterator[None]:
        """Record what the block takes as a stage of this name."""
        self._reset_peak()
        before, begin = self.used, time.perf_counter()
        try:
            yield
        finally:
            seconds = round(time.perf_counter() - begin, 3)
            self.stages.append(Stage(name, before, self.used, max(self.peak, self.used), self.held, seconds))

    def kv_cache_bytes(self, megabytes: int, largest_pass: Callable[[], object], reserve: int = 0) -> int:
        """How much the KV cache may take; to be asked when the weights are there and nothing else.

        Args:
            megabytes: `engine.kv_cache_mb`; 0 measures.
            largest_pass: runs the pass that needs the most memory beside the cache.
            reserve: bytes of what comes later, such as CUDA graphs and their buffers.

        Raises:
            ConfigError: nothing is left.
        """
        if megabytes:
            return megabytes * MIB
        if self.device.type != "cuda":
            return CPU_KV_CACHE
        weights = self.used
        with self.tag("largest pass"):
            largest_pass()
        extra = self.stages[-1].peak - weights
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(self.device)
        room = left(self.budget, weights, extra + reserve, free)
        if room <= 0:
            raise ConfigError(
                f"memory: {self.budget // MIB} MiB are allowed and {free // MIB} free, the weights take "
                f"{weights // MIB} and a forward pass {extra // MIB}: nothing is left for the KV cache; raise "
                "memory.fraction, or lower engine.max_tokens_per_step"
            )
        return room

    @property
    def used(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.memory_allocated(self.device)
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    @property
    def held(self) -> int:
        return torch.cuda.memory_reserved(self.device) if self.device.type == "cuda" else self.used

    @property
    def peak(self) -> int:
        """The most that was used since the last stage began."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024

    def report(self) -> dict[str, Any]:
        """For JSON, in bytes."""
        return {
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu",
            "total": self.total,
            "budget": self.budget,
            "used": self.used,
            "held": self.held,
            "stages": [asdict(stage) for stage in self.stages],
        }

    def table(self) -> str:
        """For people, in MiB."""
        lines = [f"{'stage':<16}{'before':>9}{'after':>9}{'peak':>9}{'held':>9}{'seconds':>9}"]
        for stage in self.stages:
            numbers = "".join(f"{n // MIB:>9}" for n in (stage.before, stage.after, stage.peak, stage.held))
            lines.append(f"{stage.name:<16}{numbers}{stage.seconds:>9.1f}")
        return "\n".join([*lines, f"{self.budget // MIB} of {self.total // MIB} MiB are allowed"])

    def _reset_peak(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            with suppress(OSError):  # some containers forbid it: the peak is then the process's own
                Path("/proc/self/clear_refs").write_text("5")


def left(budget: int, weights: int, needed: int, free: int) -> int:
    """What the KV cache may take: within the budget, and within what other processes have left free."""
    return min(budget - weights, free) - needed - MARGIN


def _total(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
