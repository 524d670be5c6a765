"""Blocks are free, evictable or referenced: by example, and in random runs."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoglm.llm.block_pool import BlockPool


def test_a_cached_prefix_is_found_and_shared() -> None:
    pool = BlockPool(4)
    first = pool.allocate(2)
    pool.cache(first[0], b"a")
    pool.cache(first[1], b"ab")
    assert pool.match([b"a", b"ab", b"abc"]) == first
    assert pool.match([b"x", b"a"]) == []
    pool.acquire(first)
    pool.check_integrity([first, first])
    pool.release(first)
    assert pool.num_available == 2
    pool.release(first)
    assert (pool.num_available, pool.num_evictable) == (4, 2)
    pool.check_integrity([])


def test_eviction_is_lru_and_takes_tails_first() -> None:
    pool = BlockPool(4)
    old, new = pool.allocate(2), pool.allocate(2)
    for block, block_hash in zip(old + new, (b"o1", b"o2", b"n1", b"n2"), strict=True):
        pool.cache(block, block_hash)
    pool.release(old)
    pool.release(new)
    pool.release(pool.allocate(1))
    assert [pool.match([each]) != [] for each in (b"o1", b"o2", b"n1", b"n2")] == [True, False, True, True]
    pool.acquire(pool.match([b"o1"]))  # now the most recently used
    pool.release(pool.match([b"o1"]))
    pool.allocate(3)
    assert pool.match([b"o1"]) != []
    assert pool.match([b"n1"]) == []


def test_duplicate_content_is_cached_once() -> None:
    pool = BlockPool(3)
    blocks = pool.allocate(2)
    for block in blocks:
        pool.cache(block, b"same")
    pool.release(blocks)
    assert (pool.num_evictable, pool.num_available) == (1, 3)
    pool.check_integrity([])


def test_allocating_too_many_fails() -> None:
    pool = BlockPool(2)
    pool.allocate(1)
    with pytest.raises(RuntimeError, match="cannot allocate 2 blocks, 1 are available"):
        pool.allocate(2)


def test_integrity_check_finds_errors() -> None:
    pool = BlockPool(3)
    blocks = pool.allocate(2)
    with pytest.raises(RuntimeError, match="reference count"):
        pool.check_integrity([blocks[:1]])
    with pytest.raises(RuntimeError, match="reference count"):
        pool.check_integrity([blocks, blocks])
    pool._free.append(blocks[0])
    with pytest.raises(RuntimeError, match="unreferenced"):
        pool.check_integrity([blocks])


operations = st.lists(
    st.one_of(
        st.tuples(st.just("release"), st.integers(0, 20)),  # the n-th list of blocks
        st.tuples(st.just("match"), st.integers(0, 5)),  # a hash
        st.tuples(st.just("allocate"), st.lists(st.one_of(st.none(), st.integers(0, 5)), max_size=4)),  # their hashes
    ),
    max_size=80,
)


@given(operations)
def test_random_operations(operations: list[tuple[str, Any]]) -> None:
    """Blocks are never lost or used twice, and a matched block has the content that was cached."""
    pool = BlockPool(12)
    held: list[list[int]] = []
    content: dict[int, int | None] = {}
    for name, argument in operations:
        if name == "release" and held:
            pool.release(held.pop(argument % len(held)))
        elif name == "match":
            found = pool.match([bytes([argument])])
            assert all(content[block] == argument for block in found)
            pool.acquire(found)
            held.append(found)
        elif name == "allocate":
            hashes = argument[: pool.num_available]
            blocks = pool.allocate(len(hashes))
            assert not {block for other in held for block in other} & set(blocks)
            for block, block_hash in zip(blocks, hashes, strict=True):
                content[block] = block_hash
                if block_hash is not None:
                    pool.cache(block, bytes([block_hash]))
            held.append(blocks)
        pool.check_integrity(held)
    for blocks in held:
        pool.release(blocks)
    assert pool.num_available == 12
