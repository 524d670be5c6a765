"""The feature cache: two tiers, limits in bytes, shared claims, failures that are not cached."""

import threading
from concurrent.futures import Future

import pytest
import torch

from autoglm.errors import RequestError
from autoglm.media.feature_cache import FeatureCache

CPU = torch.device("cpu")
SIZE = 64  # bytes of one entry


def features(value: int) -> torch.Tensor:
    return torch.full((4, 8), value, dtype=torch.bfloat16)


def fill(cache: FeatureCache, *values: int) -> None:
    for value in values:
        _, is_mine = cache.claim(str(value))
        assert is_mine
        cache.put(str(value), features(value))


def is_cached(cache: FeatureCache, value: int) -> bool:
    """Look up an entry; the claim of a missing one is withdrawn."""
    future, is_mine = cache.claim(str(value))
    if is_mine:
        cache.fail(str(value), RequestError("withdrawn"))
        return False
    assert torch.equal(future.result(0), features(value))
    return True


def test_hit_and_miss() -> None:
    cache = FeatureCache(CPU, 10 * SIZE)
    assert not is_cached(cache, 1)
    fill(cache, 1)
    assert is_cached(cache, 1)
    assert not is_cached(cache, 2)
    stats = cache.stats
    assert (stats.hits, stats.misses, stats.entries, stats.bytes, stats.evictions) == (1, 3, 1, SIZE, 0)


def test_the_least_recently_used_entry_is_evicted_first() -> None:
    cache = FeatureCache(CPU, 3 * SIZE)
    fill(cache, 1, 2, 3)
    assert is_cached(cache, 1)
    fill(cache, 4)
    assert [is_cached(cache, value) for value in (1, 2, 3, 4)] == [True, False, True, True]
    assert (cache.stats.evictions, cache.stats.entries, cache.stats.bytes) == (1, 3, 3 * SIZE)


def test_evicted_features_stay_valid_for_their_users() -> None:
    cache = FeatureCache(CPU, SIZE)
    fill(cache, 1)
    held = cache.claim("1")[0].result()
    fill(cache, 2, 3)
    assert torch.equal(held, features(1))


def test_entries_evicted_from_the_device_move_to_the_host() -> None:
    cache = FeatureCache(CPU, 2 * SIZE, 2 * SIZE)
    fill(cache, 1, 2, 3, 4)
    assert (cache.stats.entries, cache.stats.bytes, cache.stats.host_bytes) == (4, 2 * SIZE, 2 * SIZE)
    assert cache.stats.evictions == 0
    assert is_cached(cache, 1)  # back to the device; 3 moves to the host
    assert (cache.stats.entries, cache.stats.bytes, cache.stats.host_bytes) == (4, 2 * SIZE, 2 * SIZE)
    fill(cache, 5)  # 4 moves to the host, which evicts 2
    assert cache.stats.evictions == 1
    assert [is_cached(cache, value) for value in (2, 5, 1, 4, 3)] == [False, True, True, True, True]


def test_the_allocated_size_of_pinned_memory_is_counted() -> None:
    cache = FeatureCache(CPU, 0, 1000)
    cache.claim("odd")
    cache.put("odd", torch.ones(33, dtype=torch.bfloat16))  # 66 bytes
    assert cache.stats.host_bytes == 128
    assert torch.equal(cache.claim("odd")[0].result(0), torch.ones(33, dtype=torch.bfloat16))


def test_an_entry_larger_than_the_cache_evicts_nothing() -> None:
    cache = FeatureCache(CPU, 2 * SIZE, SIZE)
    fill(cache, 1, 2)
    cache.claim("big")
    cache.put("big", torch.zeros(1000))
    assert is_cached(cache, 1) and is_cached(cache, 2)
    assert (cache.stats.entries, cache.stats.evictions) == (2, 0)


def test_a_disabled_cache_still_shares_claims() -> None:
    cache = FeatureCache(CPU, 0)
    first, mine = cache.claim("1")
    second, also_mine = cache.claim("1")
    assert (mine, also_mine) == (True, False)
    cache.put("1", features(1))
    assert torch.equal(first.result(0), second.result(0))
    assert not is_cached(cache, 1)


def test_a_failure_reaches_all_claims_and_is_not_cached() -> None:
    cache = FeatureCache(CPU, 10 * SIZE)
    shares = [cache.claim("1")[0] for _ in range(3)]
    cache.fail("1", RequestError("broken"))
    for share in shares:
        with pytest.raises(RequestError, match="broken"):
            share.result(0)
    fill(cache, 1)
    assert is_cached(cache, 1)


def test_concurrent_claims_encode_once() -> None:
    cache = FeatureCache(CPU, 100 * SIZE, 100 * SIZE)
    encoded: list[str] = []
    barrier = threading.Barrier(8)
    wrong: list[str] = []

    def claim_all() -> None:
        barrier.wait()
        for value in range(50):
            future: Future[torch.Tensor]
            future, is_mine = cache.claim(str(value))
            if is_mine:
                encoded.append(str(value))
                cache.put(str(value), features(value))
            if not torch.equal(future.result(10), features(value)):
                wrong.append(str(value))

    threads = [threading.Thread(target=claim_all) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(encoded, key=int) == [str(value) for value in range(50)]
    assert not wrong
    assert (cache.stats.hits, cache.stats.misses, cache.stats.entries) == (350, 50, 50)
