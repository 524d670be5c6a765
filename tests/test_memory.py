"""The memory manager on the CPU, and its arithmetic for GPUs."""

import json
import os

import pytest
import torch

from autoglm import memory
from autoglm.config import MemoryConfig
from autoglm.memory import CPU_KV_CACHE, MARGIN, MIB, MemoryManager, left

CPU = torch.device("cpu")
GIB = 1024 * MIB


@pytest.fixture(autouse=True)
def settings_stay_here() -> object:
    benchmark, tf32 = torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32
    yield
    torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32 = benchmark, tf32


def test_stages_show_what_took_memory() -> None:
    manager = MemoryManager(MemoryConfig(), CPU)
    with manager.tag("weights"):
        kept = torch.ones(64 * MIB, dtype=torch.uint8)
    with manager.tag("pass"):
        torch.ones(96 * MIB, dtype=torch.uint8)
    weights, forward = manager.stages
    assert weights.after - weights.before >= 0.9 * len(kept)
    assert forward.peak - forward.before >= 80 * MIB
    assert forward.after - forward.before < 32 * MIB
    report = json.loads(json.dumps(manager.report()))
    assert [stage["name"] for stage in report["stages"]] == ["weights", "pass"]
    assert report["used"] > len(kept)
    rows = manager.table().splitlines()
    assert rows[0].split() == ["stage", "before", "after", "peak", "held", "seconds"]
    assert [row.split()[0] for row in rows[1:3]] == ["weights", "pass"]


def test_a_stage_that_fails_is_shown_too() -> None:
    manager = MemoryManager(MemoryConfig(), CPU)
    with pytest.raises(RuntimeError), manager.tag("weights"):
        raise RuntimeError
    assert len(manager.stages) == 1


def test_budget_is_a_fraction_or_a_number() -> None:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert MemoryManager(MemoryConfig(fraction=0.5), CPU).budget == total // 2
    assert MemoryManager(MemoryConfig(limit_mb=100), CPU).budget == 100 * MIB
    assert MemoryManager(MemoryConfig(limit_mb=10**9), CPU).budget == total


def test_cache_on_the_cpu_is_not_measured() -> None:
    manager = MemoryManager(MemoryConfig(), CPU)
    assert manager.kv_cache_bytes(0, pytest.fail) == CPU_KV_CACHE
    assert manager.kv_cache_bytes(7, pytest.fail) == 7 * MIB


def test_what_is_left_for_the_cache() -> None:
    # The budget decides where the device is free, what is free where others have taken their part.
    assert left(20 * GIB, 9 * GIB, 3 * GIB, free=100 * GIB) == 8 * GIB - MARGIN
    assert left(20 * GIB, 9 * GIB, 3 * GIB, free=5 * GIB) == 2 * GIB - MARGIN
    assert left(10 * GIB, 9 * GIB, 3 * GIB, free=100 * GIB) < 0
    assert memory.MARGIN > 0
