"""The memory manager on the CPU, and its computation of the KV cache on a GPU."""

import json
import mmap
import os

import pytest
import torch

from autoglm.config import MemoryConfig
from autoglm.memory import CPU_KV_CACHE, MARGIN, MIB, MemoryManager, kv_cache_room

CPU = torch.device("cpu")
GIB = 1024 * MIB


@pytest.fixture(autouse=True)
def restore_settings() -> object:
    benchmark, tf32 = torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32
    yield
    torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32 = benchmark, tf32


def allocate(size: int) -> mmap.mmap:
    """New pages, all written: unlike torch's, they never come from memory that the process has freed before."""
    pages = mmap.mmap(-1, size)
    for offset in range(0, size, mmap.PAGESIZE):
        pages[offset] = 1
    return pages


def test_stages_show_the_use_of_memory() -> None:
    manager = MemoryManager(MemoryConfig(), CPU)
    with manager.tag("weights"):
        weights_pages = allocate(64 * MIB)
    with manager.tag("pass"):
        allocate(96 * MIB).close()
    weights, forward = manager.stages
    assert weights.after - weights.before >= 0.9 * len(weights_pages)
    assert forward.peak - forward.before >= 80 * MIB
    assert forward.after - forward.before < 32 * MIB
    report = json.loads(json.dumps(manager.report()))
    assert [stage["name"] for stage in report["stages"]] == ["weights", "pass"]
    assert report["used"] > len(weights_pages)
    weights_pages.close()
    rows = manager.table().splitlines()
    assert rows[0].split() == ["stage", "before", "after", "peak", "reserved", "seconds"]
    assert [row.split()[0] for row in rows[1:3]] == ["weights", "pass"]


def test_a_failed_stage_is_recorded() -> None:
    manager = MemoryManager(MemoryConfig(), CPU)
    with pytest.raises(RuntimeError), manager.tag("weights"):
        raise RuntimeError
    assert len(manager.stages) == 1


def test_the_budget_is_a_fraction_or_a_size() -> None:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert MemoryManager(MemoryConfig(fraction=0.5), CPU).budget == total // 2
    assert MemoryManager(MemoryConfig(limit_mb=100), CPU).budget == 100 * MIB
    assert MemoryManager(MemoryConfig(limit_mb=10**9), CPU).budget == total


def test_the_cache_on_the_cpu_is_not_measured() -> None:
    manager = MemoryManager(MemoryConfig(), CPU)
    assert manager.kv_cache_bytes(0, pytest.fail) == CPU_KV_CACHE
    assert manager.kv_cache_bytes(7, pytest.fail) == 7 * MIB


def test_the_room_for_the_cache_is_limited_by_budget_and_free_memory() -> None:
    assert kv_cache_room(budget=20 * GIB, weights=9 * GIB, extra=3 * GIB, free=100 * GIB) == 8 * GIB - MARGIN
    assert kv_cache_room(budget=20 * GIB, weights=9 * GIB, extra=3 * GIB, free=5 * GIB) == 2 * GIB - MARGIN
    assert kv_cache_room(budget=10 * GIB, weights=9 * GIB, extra=3 * GIB, free=100 * GIB) < 0
    assert MARGIN > 0
