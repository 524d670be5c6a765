"""Which tokens of which sequences go into the next forward pass.

Decoding sequences come first, one token each; what is left of the token budget goes to prompts, the oldest first, cut
into chunks. A waiting sequence is admitted only when the pool holds its worst case (prompt and longest answer), so a
running one never lacks a block. A more urgent one may push out less urgent ones, which are computed again later.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass

from autoglm.errors import ErrorCode, RequestError
from autoglm.llm.block_pool import BlockPool
from autoglm.llm.sequence import Sequence


@dataclass(frozen=True)
class Chunk:
    """Tokens [start, start + length) of a sequence; `samples` if the pass yields its next token."""

    sequence: Sequence
    start: int
    length: int

    @property
    def samples(self) -> bool:
        return self.start + self.length == len(self.sequence.tokens)


class Scheduler:
    def __init__(
        self,
        pool: BlockPool,
        block_size: int,
        max_batch_size: int,
        max_tokens_per_step: int,
        max_queue_size: int,
        prefix_cache: bool = True,
    ) -> None:
        self.pool = pool
        self.block_size = block_size
        self.max_batch_size = max_batch_size
        self.max_tokens_per_step = max_tokens_per_step
        self.max_queue_size = max_queue_size
        self.prefix_cache = prefix_cache
        self.waiting: list[Sequence] = []  # sorted by urgency, then arrival
        self.running: list[Sequence] = []  # in order of admission

    def __iter__(self) -> Iterator[Sequence]:
        yield from self.running
        yield from self.waiting

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence.

        Raises:
            RequestError: UNAVAILABLE if the queue is full, INVALID_ARGUMENT if the pool could never hold it.
        """
        if len(self.waiting) >= self.max_queue_size:
            raise RequestError(
                f"the queue is full: {self.max_queue_size} requests are waiting (engine.max_queue_size)",
                ErrorCode.UNAVAILABLE,
            )
        worst = self._worst_case(sequence)
        if worst > self.pool.size:
            raise RequestError(
                f"prompt and max_tokens: {sequence.max_length} tokens need {worst} blocks of the KV cache, "
                f"it has {self.pool.size} (engine.kv_cache_mb)"
            )
        self._enqueue(sequence)

    def schedule(self) -> list[Chunk]:
        """Choose the next pass and give its sequences the blocks that they write to. Empty when nothing is to do."""
        self._preempt_less_urgent()
        budget = self.max_tokens_per_step
        chunks: list[Chunk] = []
        for sequence in sorted(self.running, key=lambda s: not s.is_decoding):
            if budget:
                budget -= self._extend(sequence, budget, chunks)
        while budget and self.waiting and self._has_seat() and self._lacks(self.waiting[0]) <= 0:
            self._admit(self.waiting.pop(0))
            budget -= self._extend(self.running[-1], budget, chunks)
        return chunks

    def complete(self, chunk: Chunk) -> None:
        """Note that the chunk's keys and values are written, and name the blocks that are full now."""
        sequence = chunk.sequence
        sequence.computed = chunk.start + chunk.length
        if self.prefix_cache:
            for index in range(sequence.published, sequence.computed // self.block_size):
                self.pool.publish(sequence.blocks[index], sequence.key(index, self.block_size))
                sequence.published = index + 1

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence, wherever it is, and give back its blocks."""
        if sequence in self.running:
            self.running.remove(sequence)
            self._release(sequence)
        else:
            self.waiting.remove(sequence)

    def check_integrity(self) -> None:
        """See `BlockPool.check_integrity`; also that waiting sequences hold nothing and running ones enough."""
        self.pool.check_integrity([sequence.blocks for sequence in self])
        if any(sequence.blocks for sequence in self.waiting):
            raise RuntimeError("a waiting sequence holds blocks")
        if any(len(s.blocks) * self.block_size < s.computed for s in self.running):
            raise RuntimeError("a running sequence has computed more tokens than its blocks hold")

    def _enqueue(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)
        self.waiting.sort(key=lambda s: (s.request.sampling.priority, s.request.arrival))

    def _extend(self, sequence: Sequence, budget: int, chunks: list[Chunk]) -> int:
        length = min(sequence.remaining, budget)
        end = sequence.computed + length
        sequence.blocks += self.pool.allocate(self._blocks(end) - len(sequence.blocks))
        chunks.append(Chunk(sequence, sequence.computed, length))
        return length

    def _has_seat(self) -> bool:
        return len(self.running) < self.max_batch_size

    def _lacks(self, sequence: Sequence) -> int:
        """Blocks that are missing before a waiting sequence can be admitted; at most 0 when it can."""
        cached = self._cached_blocks(sequence)
        needed = self._worst_case(sequence) - len(cached) + self.pool.count_idle(cached)
        return needed - self.pool.available + sum(map(self._outstanding, self.running))

    def _admit(self, sequence: Sequence) -> None:
        """Let a sequence run, on top of the blocks that are computed already."""
        sequence.blocks = self._cached_blocks(sequence)
        self.pool.take(sequence.blocks)
        sequence.published = len(sequence.blocks)
        sequence.computed = sequence.published * self.block_size
        if sequence.scheduled_at is None:
            sequence.scheduled_at = time.monotonic()
            sequence.cached_tokens = sequence.computed
        self.running.append(sequence)

    def _preempt_less_urgent(self) -> None:
        """Where the first waiting sequence finds no room, push out less urgent ones, if that makes enough."""
        if not self.waiting:
            return
        priority = self.waiting[0].request.sampling.priority
        victims = [s for s in reversed(self.running) if s.request.sampling.priority > priority]
        victims.sort(key=lambda s: -s.request.sampling.priority)  # stable: the latest of the least urgent first
        lacking = self._lacks(self.waiting[0]) if victims else 0
        chosen: list[Sequence] = []
        for victim in victims:
            if lacking <= 0 and len(self.running) - len(chosen) < self.max_batch_size:
                break
            chosen.append(victim)
            lacking -= self._outstanding(victim) + self.pool.count_sole(victim.blocks)
        if lacking <= 0:
            for victim in chosen:
                self._preempt(victim)

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._release(sequence)
        self._enqueue(sequence)

    def _release(self, sequence: Sequence) -> None:
        self.pool.release(sequence.blocks)
        sequence.blocks = []
        sequence.computed = sequence.published = 0

    def _cached_blocks(self, sequence: Sequence) -> list[int]:
        """Blocks that hold the sequence's beginning. Its last token is always computed: its logits are needed."""
        if not self.prefix_cache:
            return []
        count = (len(sequence.tokens) - 1) // self.block_size
        return self.pool.match([sequence.key(index, self.block_size) for index in range(count)])

    def _blocks(self, tokens: int) -> int:
        return -(-tokens // self.block_size)

    def _worst_case(self, sequence: Sequence) -> int:
        # The last token's keys and values are never needed, so max_length - 1 tokens are stored at the most.
        return self._blocks(max(sequence.max_length - 1, sequence.prompt_length))

    def _outstanding(self, sequence: Sequence) -> int:
        return self._worst_case(sequence) - len(sequence.blocks)
