"""Chooses the tokens of the next forward pass.

Decoding sequences come first, one token each; prompts follow, oldest first, cut into chunks that fit a token budget.
The budget is smaller while others decode, to bound their latency. A waiting sequence is admitted only when the pool has
blocks for its worst case (prompt and longest answer), so a running sequence never runs out of blocks. A more urgent
request may preempt less urgent ones, which are recomputed later.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

from autoglm.config import EngineConfig
from autoglm.errors import ErrorCode, RequestError
from autoglm.llm.block_pool import BlockPool
from autoglm.llm.sequence import Sequence

MAX_MIXED_PROMPTS = 8  # prompts in a pass with decoding sequences: the captured graphs have room for no more
SMALL_DECODE_BATCH = 16


@dataclass(frozen=True)
class Chunk:
    """Tokens [start, start + length) of a sequence, computed in one pass."""

    sequence: Sequence
    start: int
    length: int
    samples: bool  # the pass samples the sequence's next token
    is_first: bool  # the first chunk since the sequence got its slot
    decodes: bool  # a single token, which the previous pass sampled into the slot

    @property
    def end(self) -> int:
        return self.start + self.length


def decode_capacity(num_decoding: int, max_batch_size: int) -> int:
    """Decode rows of a mixed pass, padded to one of two sizes so that each has a CUDA graph."""
    return min(SMALL_DECODE_BATCH, max_batch_size) if num_decoding <= SMALL_DECODE_BATCH else max_batch_size


class Scheduler:
    """Holds the waiting and the running sequences, and chooses the chunks of each pass."""

    def __init__(self, config: EngineConfig, pool: BlockPool) -> None:
        self.config = config
        self.pool = pool
        self.block_size = config.block_size
        self.max_batch_size = config.max_batch_size
        self.max_tokens_per_step = config.max_tokens_per_step
        self.max_tokens_per_mixed_step = min(config.max_tokens_per_step, config.max_tokens_per_mixed_step)
        self.waiting: list[Sequence] = []  # sorted by priority, then arrival
        self.running: list[Sequence] = []  # in order of admission
        self._free_slots = list(range(config.max_batch_size - 1, -1, -1))

    def __iter__(self) -> Iterator[Sequence]:
        yield from self.running
        yield from self.waiting

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence.

        Raises:
            RequestError: UNAVAILABLE if the queue is full, INVALID_ARGUMENT if the sequence can never fit the pool.
        """
        if len(self.waiting) >= self.config.max_queue_size:
            raise RequestError(
                f"the queue is full: {self.config.max_queue_size} requests are waiting (engine.max_queue_size)",
                ErrorCode.UNAVAILABLE,
            )
        worst_case = self._worst_case_blocks(sequence)
        if worst_case > self.pool.num_blocks:
            raise RequestError(
                f"prompt plus max_tokens must fit into the {self.pool.num_blocks} blocks of the KV cache "
                f"(got {sequence.max_length} tokens, which need {worst_case}; engine.kv_cache_mb)"
            )
        self._enqueue(sequence)

    def schedule(self) -> list[Chunk]:
        """Choose the next pass and allocate the blocks it writes. Empty if there is nothing to compute.

        Chunks of decoding sequences come first.
        """
        self._preempt_less_urgent()
        chunks = [self._extend(s, 1) for s in self.running if s.decodes and s.num_remaining]
        budget = self.max_tokens_per_step
        if chunks:
            budget = self.max_tokens_per_mixed_step
            budget = max(budget - decode_capacity(len(chunks), self.max_batch_size), budget // 2, 1)
        prompts = [s for s in self.running if not s.decodes]
        max_chunks = len(chunks) + MAX_MIXED_PROMPTS if chunks else self.max_batch_size
        while budget and len(chunks) < max_chunks and (prompts or self._admit_next()):
            sequence = prompts.pop(0) if prompts else self.running[-1]
            chunks.append(self._extend(sequence, budget))
            budget -= chunks[-1].length
        return chunks

    def mark_launched(self, chunks: list[Chunk]) -> None:
        """Record that a pass computes these chunks."""
        for chunk in chunks:
            sequence = chunk.sequence
            sequence.num_computed = chunk.end
            sequence.slot_initialized, sequence.decodes = True, chunk.samples
            sequence.num_pending += chunk.samples
            sequence.num_in_flight += 1

    def discard_sample(self, sequence: Sequence, in_flight: list[Chunk]) -> None:
        """Record that a sequence got forced tokens after its last sampled one: a later pass computes them.

        Args:
            in_flight: chunks of the pass launched since, changed in place: its sample for the sequence is discarded.
        """
        sequence.decodes = False
        for index, chunk in enumerate(in_flight):
            if chunk.sequence is sequence:
                in_flight[index] = replace(chunk, samples=False)
                sequence.num_pending -= chunk.samples

    def mark_completed(self, chunk: Chunk) -> None:
        """Record that the chunk's keys and values are written, and add the full blocks to the prefix cache."""
        sequence = chunk.sequence
        sequence.num_in_flight -= 1
        sequence.num_pending -= chunk.samples
        if sequence.slot is None or not self.config.prefix_cache:  # preempted or finished: its blocks are released
            return
        for index in range(sequence.num_cached_blocks, min(chunk.end, sequence.cacheable_length) // self.block_size):
            self.pool.cache(sequence.blocks[index], sequence.block_hash(index, self.block_size))
            sequence.num_cached_blocks = index + 1

    def preempt(self, sequence: Sequence) -> None:
        """Put a running sequence back into the queue. Its blocks are released, its tokens recomputed later."""
        self.running.remove(sequence)
        self._release(sequence)
        self._enqueue(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Drop a running or waiting sequence, and release its blocks and slot."""
        sequence.removed = True
        if sequence in self.running:
            self.running.remove(sequence)
            self._release(sequence)
        else:
            self.waiting.remove(sequence)

    def check_integrity(self) -> None:
        """See `BlockPool.check_integrity`; also checks blocks per sequence and the request slots."""
        self.pool.check_integrity([sequence.blocks for sequence in self])
        if any(sequence.blocks for sequence in self.waiting):
            raise RuntimeError("a waiting sequence holds blocks")
        if any(len(s.blocks) * self.block_size < s.num_computed for s in self.running):
            raise RuntimeError("a running sequence has computed more tokens than its blocks hold")
        used = [-1 if sequence.slot is None else sequence.slot for sequence in self.running]
        if sorted([*self._free_slots, *used]) != list(range(self.max_batch_size)):
            raise RuntimeError("the request slots are not exactly the free ones and those of running sequences")

    def _enqueue(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)
        self.waiting.sort(key=lambda s: (s.priority, s.request.arrival_time))

    def _extend(self, sequence: Sequence, budget: int) -> Chunk:
        start = sequence.num_computed
        length = min(sequence.num_remaining, budget)
        end = start + length
        sequence.blocks += self.pool.allocate(self._num_blocks(end) - len(sequence.blocks))
        samples = end == sequence.length
        return Chunk(sequence, start, length, samples, not sequence.slot_initialized, sequence.decodes)

    def _missing_blocks(self, sequence: Sequence) -> int:
        """Blocks missing to admit a waiting sequence; at most 0 if it can be admitted."""
        cached = self._cached_blocks(sequence)
        needed = self._worst_case_blocks(sequence) - len(cached) + self.pool.count_unreferenced(cached)
        return needed - self.pool.num_available + sum(map(self._outstanding_blocks, self.running))

    def _admit_next(self) -> bool:
        """Admit the first waiting sequence, on top of its cached prefix, if there is room."""
        if not self.waiting or not self._free_slots:
            return False
        sequence = self.waiting[0]
        if sequence.num_in_flight or self._missing_blocks(sequence) > 0:
            return False
        self.waiting.pop(0)
        sequence.slot = self._free_slots.pop()
        sequence.blocks = self._cached_blocks(sequence)
        self.pool.acquire(sequence.blocks)
        sequence.num_cached_blocks = len(sequence.blocks)
        sequence.num_computed = sequence.num_cached_blocks * self.block_size
        if sequence.scheduled_time is None:
            sequence.scheduled_time = time.monotonic()
            sequence.num_cached_tokens = sequence.num_computed
        self.running.append(sequence)
        return True

    def _preempt_less_urgent(self) -> None:
        """If the first waiting sequence does not fit, preempt less urgent ones, provided that makes enough room."""
        if not self.waiting or self.waiting[0].num_in_flight:
            return
        victims = [s for s in reversed(self.running) if s.priority > self.waiting[0].priority]
        victims.sort(key=lambda s: -s.priority)  # stable: the latest of the least urgent first
        missing = self._missing_blocks(self.waiting[0]) if victims else 0
        chosen: list[Sequence] = []
        for victim in victims:
            if missing <= 0 and len(self.running) - len(chosen) < self.max_batch_size:
                break
            chosen.append(victim)
            missing -= self._outstanding_blocks(victim) + self.pool.count_exclusive(victim.blocks)
        if missing <= 0:
            for victim in chosen:
                self.preempt(victim)

    def _release(self, sequence: Sequence) -> None:
        # A pass in flight may still write to the blocks. Passes launched later run after it.
        self.pool.release(sequence.blocks)
        if sequence.slot is not None:
            self._free_slots.append(sequence.slot)
        sequence.blocks, sequence.slot = [], None
        sequence.slot_initialized = sequence.decodes = False
        sequence.num_computed = sequence.num_cached_blocks = 0

    def _cached_blocks(self, sequence: Sequence) -> list[int]:
        """Cached blocks of the sequence's prefix. The last token is always computed: its logits are needed."""
        if not self.config.prefix_cache:
            return []
        count = (len(sequence.token_ids) - 1) // self.block_size
        return self.pool.match([sequence.block_hash(index, self.block_size) for index in range(count)])

    def _num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def _worst_case_blocks(self, sequence: Sequence) -> int:
        # The final token at max_length is never fed back: at most max_length - 1 tokens are stored.
        return self._num_blocks(max(sequence.max_length - 1, sequence.prompt_length))

    def _outstanding_blocks(self, sequence: Sequence) -> int:
        return self._worst_case_blocks(sequence) - len(sequence.blocks)
