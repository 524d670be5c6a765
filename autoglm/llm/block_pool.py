"""The blocks of the paged KV cache: who holds them, what they contain, which may be taken.

A block is empty, idle (nobody holds it, its content is kept for reuse), or held by one or more sequences.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence


class BlockPool:
    """Hands out blocks 0..size-1; content is named by keys (see `prefix_keys`), eviction is least recently used."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._holders = [0] * size
        self._empty = list(range(size - 1, -1, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._key_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}

    @property
    def available(self) -> int:
        """Blocks that can be allocated now, idle ones included."""
        return len(self._empty) + len(self._idle)

    @property
    def idle(self) -> int:
        return len(self._idle)

    def match(self, keys: Sequence[bytes]) -> list[int]:
        """The blocks of the longest known run of `keys` from the start. Takes nothing."""
        found: list[int] = []
        for key in keys:
            block = self._block_of.get(key)
            if block is None:
                break
            found.append(block)
        return found

    def count_idle(self, blocks: Iterable[int]) -> int:
        return sum(1 for block in blocks if not self._holders[block])

    def count_sole(self, blocks: Iterable[int]) -> int:
        """How many of `blocks` have one holder, and would be available without it."""
        return sum(1 for block in blocks if self._holders[block] == 1)

    def take(self, blocks: Iterable[int]) -> None:
        """Become one more holder of blocks that `match` found."""
        for block in blocks:
            if not self._holders[block]:
                del self._idle[block]
            self._holders[block] += 1

    def allocate(self, count: int) -> list[int]:
        """Take `count` blocks to write to, forgetting the content of the longest unused where no block is empty."""
        if count > self.available:
            raise RuntimeError(f"{count} blocks wanted, {self.available} available")
        blocks = []
        for _ in range(count):
            if self._empty:
                block = self._empty.pop()
            else:
                block, _ = self._idle.popitem(last=False)
                del self._block_of[self._key_of.pop(block)]
            self._holders[block] = 1
            blocks.append(block)
        return blocks

    def publish(self, block: int, key: bytes) -> None:
        """Name the content of a full block. Where another block has that content already, this one stays nameless."""
        if key not in self._block_of and block not in self._key_of:
            self._block_of[key] = block
            self._key_of[block] = key

    def release(self, blocks: Sequence[int]) -> None:
        """Stop holding blocks. The last ones are evicted first: a prefix is worth more than what follows it."""
        for block in reversed(blocks):
            self._holders[block] -= 1
            if self._holders[block] == 0:
                if block in self._key_of:
                    self._idle[block] = None
                else:
                    self._empty.append(block)

    def check_integrity(self, held: Iterable[Sequence[int]]) -> None:
        """Prove that every block is empty, idle or held exactly as often as `held` (a list for each sequence) says.

        Raises:
            RuntimeError: a block is lost, doubled or counted wrongly.
        """
        holders = [0] * self.size
        for blocks in held:
            for block in blocks:
                holders[block] += 1
        if holders != self._holders:
            wrong = next(i for i, count in enumerate(holders) if count != self._holders[i])
            raise RuntimeError(f"block {wrong} counts {self._holders[wrong]} holders, {holders[wrong]} hold it")
        unheld = sorted([*self._empty, *self._idle])
        if unheld != [i for i, count in enumerate(holders) if count == 0]:
            raise RuntimeError("the empty and idle blocks are not exactly those that nobody holds")
        if {key: block for block, key in self._key_of.items()} != self._block_of:
            raise RuntimeError("keys and blocks do not name each other")
        if any(block not in self._key_of for block in self._idle) or any(b in self._key_of for b in self._empty):
            raise RuntimeError("an idle block has no content, or an empty one has")
