"""The blocks of the paged KV cache: reference counts, content hashes, eviction.

A block is free (no content), evictable (cached content, no reference), or referenced by one or more sequences.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence


class BlockPool:
    """Allocates blocks 0 to num_blocks - 1. Cached blocks are evicted in least-recently-used order."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._ref_counts = [0] * num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        self._evictable: OrderedDict[int, None] = OrderedDict()
        self._hash_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}

    @property
    def num_available(self) -> int:
        """Blocks that can be allocated now: free and evictable ones."""
        return len(self._free) + len(self._evictable)

    @property
    def num_evictable(self) -> int:
        return len(self._evictable)

    def match(self, block_hashes: Sequence[bytes]) -> list[int]:
        """The cached blocks of the longest prefix of `block_hashes`. Takes no reference."""
        blocks: list[int] = []
        for block_hash in block_hashes:
            block = self._block_of.get(block_hash)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def count_unreferenced(self, blocks: Iterable[int]) -> int:
        return sum(1 for block in blocks if not self._ref_counts[block])

    def count_exclusive(self, blocks: Iterable[int]) -> int:
        """How many of `blocks` have a single reference, and become available when it is dropped."""
        return sum(1 for block in blocks if self._ref_counts[block] == 1)

    def acquire(self, blocks: Iterable[int]) -> None:
        """Add a reference to blocks returned by `match`."""
        for block in blocks:
            if not self._ref_counts[block]:
                del self._evictable[block]
            self._ref_counts[block] += 1

    def allocate(self, count: int) -> list[int]:
        """Take `count` blocks for writing, with one reference each. Evicts cached blocks when no block is free."""
        if count > self.num_available:
            raise RuntimeError(f"cannot allocate {count} blocks, {self.num_available} are available")
        blocks = []
        for _ in range(count):
            if self._free:
                block = self._free.pop()
            else:
                block, _ = self._evictable.popitem(last=False)
                del self._block_of[self._hash_of.pop(block)]
            self._ref_counts[block] = 1
            blocks.append(block)
        return blocks

    def cache(self, block: int, block_hash: bytes) -> None:
        """Register the content of a full block. A duplicate of a cached block is not registered."""
        if block_hash not in self._block_of and block not in self._hash_of:
            self._block_of[block_hash] = block
            self._hash_of[block] = block_hash

    def release(self, blocks: Sequence[int]) -> None:
        """Drop a reference to each block. The last blocks are evicted first: a prefix is reused more often."""
        for block in reversed(blocks):
            self._ref_counts[block] -= 1
            if self._ref_counts[block] == 0:
                if block in self._hash_of:
                    self._evictable[block] = None
                else:
                    self._free.append(block)

    def check_integrity(self, references: Iterable[Sequence[int]]) -> None:
        """Check that every block is free, evictable, or referenced as often as in `references`, a list per sequence.

        Raises:
            RuntimeError: a block is lost, used twice, or its reference count is wrong.
        """
        counts = [0] * self.num_blocks
        for blocks in references:
            for block in blocks:
                counts[block] += 1
        if counts != self._ref_counts:
            wrong = next(i for i, count in enumerate(counts) if count != self._ref_counts[i])
            raise RuntimeError(f"block {wrong} has reference count {self._ref_counts[wrong]}, expected {counts[wrong]}")
        unreferenced = sorted([*self._free, *self._evictable])
        if unreferenced != [i for i, count in enumerate(counts) if count == 0]:
            raise RuntimeError("the free and evictable blocks are not exactly the unreferenced ones")
        if {block_hash: block for block, block_hash in self._hash_of.items()} != self._block_of:
            raise RuntimeError("block hashes and blocks do not map to each other")
        if any(b not in self._hash_of for b in self._evictable) or any(b in self._hash_of for b in self._free):
            raise RuntimeError("an evictable block has no hash, or a free block has one")
