"""Blocks are empty, idle or held, never anything else, whatever happens to them."""

import random

import pytest

from autoglm.llm.block_pool import BlockPool


def test_prefix_is_found_and_shared() -> None:
    pool = BlockPool(4)
    first = pool.allocate(2)
    pool.publish(first[0], b"a")
    pool.publish(first[1], b"ab")
    assert pool.match([b"a", b"ab", b"abc"]) == first
    assert pool.match([b"x", b"a"]) == []
    pool.take(first)
    pool.check_integrity([first, first])
    pool.release(first)
    assert pool.available == 2
    pool.release(first)
    assert (pool.available, pool.idle) == (4, 2)
    pool.check_integrity([])


def test_eviction_takes_the_longest_unused_and_tails_first() -> None:
    pool = BlockPool(4)
    old, new = pool.allocate(2), pool.allocate(2)
    for block, key in zip(old + new, (b"o1", b"o2", b"n1", b"n2"), strict=True):
        pool.publish(block, key)
    pool.release(old)
    pool.release(new)
    pool.release(pool.allocate(1))
    assert [pool.match([key]) != [] for key in (b"o1", b"o2", b"n1", b"n2")] == [True, False, True, True]
    pool.take(pool.match([b"o1"]))  # used again: now the newest
    pool.release(pool.match([b"o1"]))
    pool.allocate(3)
    assert pool.match([b"o1"]) != []
    assert pool.match([b"n1"]) == []


def test_same_content_twice_is_kept_once() -> None:
    pool = BlockPool(3)
    blocks = pool.allocate(2)
    for block in blocks:
        pool.publish(block, b"same")
    pool.release(blocks)
    assert (pool.idle, pool.available) == (1, 3)
    pool.check_integrity([])


def test_too_many_are_refused() -> None:
    pool = BlockPool(2)
    pool.allocate(1)
    with pytest.raises(RuntimeError, match="2 blocks wanted, 1 available"):
        pool.allocate(2)


def test_integrity_check_sees_faults() -> None:
    pool = BlockPool(3)
    blocks = pool.allocate(2)
    with pytest.raises(RuntimeError, match="holders"):
        pool.check_integrity([blocks[:1]])
    with pytest.raises(RuntimeError, match="holders"):
        pool.check_integrity([blocks, blocks])
    pool._empty.append(blocks[0])
    with pytest.raises(RuntimeError, match="nobody holds"):
        pool.check_integrity([blocks])


@pytest.mark.parametrize("seed", range(5))
def test_random_life(seed: int) -> None:
    chance, pool = random.Random(seed), BlockPool(12)
    held: list[list[int]] = []
    for _ in range(500):
        if held and chance.random() < 0.45:
            pool.release(held.pop(chance.randrange(len(held))))
        elif chance.random() < 0.4:
            found = pool.match([bytes([chance.randrange(6)])])
            pool.take(found)
            held.append(found)
        else:
            blocks = pool.allocate(min(pool.available, chance.randrange(4)))
            for block in blocks:
                if chance.random() < 0.6:
                    pool.publish(block, bytes([chance.randrange(6)]))
            held.append(blocks)
        pool.check_integrity(held)
    for blocks in held:
        pool.release(blocks)
    assert pool.available == 12
