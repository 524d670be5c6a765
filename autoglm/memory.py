"""The memory of a process: its budget, its use by stage, and the room for the KV cache.

On a GPU the numbers are those of torch's allocator, without the CUDA context. On the CPU they are the resident set
size, and nothing is limited.
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
MARGIN = 512 * MIB  # for fragmentation, kernel code and CUDA graph metadata
CPU_KV_CACHE = 4096 * MIB


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of start-up: bytes in use before and after it and at its peak, and bytes reserved by the allocator."""

    name: str
    before: int
    after: int
    peak: int
    reserved: int
    seconds: float


class MemoryManager:
    """Created once per process, before anything else is on the device.

    Limits the allocator to the budget, and sets flags of the backends that suit inference only.
    """

    def __init__(self, config: MemoryConfig, device: torch.device) -> None:
        self.device = device
        self.stages: list[Stage] = []
        self.total = _total(device)
        self.budget = min(config.limit_mb * MIB or int(config.fraction * self.total), self.total)
        torch.backends.cudnn.benchmark = False  # it would time every new image shape
        torch.backends.cudnn.allow_tf32 = False  # float32 stays exact
        if device.type == "cuda":
            # Prompts of all lengths would fragment segments of fixed size. (Expandable segments cannot be shared with
            # other processes, so the vision encoder must not use them.)
            torch._C._accelerator_setAllocatorSettings("expandable_segments:True")
            torch.cuda.set_per_process_memory_fraction(self.budget / self.total, device)

    @contextmanager
    def tag(self, name: str) -> Iterator[None]:
        """Record the block as a stage of this name."""
        self._reset_peak()
        before, begin = self.used, time.perf_counter()
        try:
            yield
        finally:
            stage = Stage(
                name=name,
                before=before,
                after=self.used,
                peak=max(self.peak, self.used),
                reserved=self.reserved,
                seconds=round(time.perf_counter() - begin, 3),
            )
            self.stages.append(stage)

    def kv_cache_bytes(self, megabytes: int, largest_pass: Callable[[], object], reserve: int = 0) -> int:
        """The size of the KV cache. Call it when the weights are loaded and nothing else is.

        Args:
            megabytes: `engine.kv_cache_mb`; 0 measures the room.
            largest_pass: runs the forward pass that needs the most memory.
            reserve: bytes for later allocations, such as CUDA graphs and their buffers.

        Raises:
            ConfigError: there is no room.
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
        room = kv_cache_room(budget=self.budget, weights=weights, extra=extra + reserve, free=free)
        if room <= 0:
            raise ConfigError(
                f"memory.fraction leaves no room for the KV cache: of a budget of {self.budget // MIB} MiB (free: "
                f"{free // MIB} MiB) the weights take {weights // MIB} MiB and a forward pass {extra // MIB} MiB; "
                "raise it, or lower engine.max_tokens_per_step"
            )
        return room

    @property
    def used(self) -> int:
        """Bytes in use."""
        if self.device.type == "cuda":
            return torch.cuda.memory_allocated(self.device)
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    @property
    def reserved(self) -> int:
        """Bytes reserved by the allocator, in use or not."""
        return torch.cuda.memory_reserved(self.device) if self.device.type == "cuda" else self.used

    @property
    def peak(self) -> int:
        """The most bytes in use since the last stage began."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024

    def report(self) -> dict[str, Any]:
        """The use of memory as JSON, in bytes."""
        return {
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu",
            "total": self.total,
            "budget": self.budget,
            "used": self.used,
            "reserved": self.reserved,
            "stages": [asdict(stage) for stage in self.stages],
        }

    def table(self) -> str:
        """The stages as a table, in MiB."""
        lines = [f"{'stage':<16}{'before':>9}{'after':>9}{'peak':>9}{'reserved':>9}{'seconds':>9}"]
        for stage in self.stages:
            numbers = "".join(f"{n // MIB:>9}" for n in (stage.before, stage.after, stage.peak, stage.reserved))
            lines.append(f"{stage.name:<16}{numbers}{stage.seconds:>9.1f}")
        return "\n".join([*lines, f"budget: {self.budget // MIB} of {self.total // MIB} MiB"])

    def _reset_peak(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            with suppress(OSError):  # forbidden in some containers; the peak is then that of the whole process
                Path("/proc/self/clear_refs").write_text("5")


def kv_cache_room(*, budget: int, weights: int, extra: int, free: int) -> int:
    """Bytes for the KV cache, within the budget and within the memory that other processes leave free."""
    return min(budget - weights, free) - extra - MARGIN


def _total(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
