"""Which tokens of which sequences go into the next forward pass.

Decoding sequences come first, one token each; prompts follow, the oldest first, cut into chunks that fit into a budget
of tokens: a small one while others decode, so that these do not wait long. A waiting sequence is admitted only when
the pool holds its worst case (prompt and longest answer), so a running one never lacks a block. A more urgent one may
push out less urgent ones, which are computed again later.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

from autoglm.errors import ErrorCode, RequestError
from autoglm.llm.block_pool import BlockPool
from autoglm.llm.sequence import Sequence

MIXED_PROMPTS = 8  # in one pass with decoding sequences: such passes have room for no more (see `graphs`)
FEW = 16  # decoding sequences


@dataclass(frozen=True)
class Chunk:
    """Tokens [start, start + length) of a sequence."""

    sequence: Sequence
    start: int
    length: int
    samples: bool  # the pass yields the sequence's next token
    enters: bool  # the first chunk since the sequence got its seat
    decodes: bool  # one token, which an earlier pass has left in the seat
    thins: bool  # with it the prompt is computed, and its keys are thinned out

    @property
    def end(self) -> int:
        return self.start + self.length


def decode_room(count: int, most: int) -> int:
    """For how many decoding sequences a pass with prompts makes room: one of two sizes, so that each has its graph."""
    return min(FEW, most) if count <= FEW else most


class Scheduler:
    def __init__(
        self,
        pool: BlockPool,
        block_size: int,
        max_batch_size: int,
        max_tokens_per_step: int,
        max_tokens_per_mixed_step: int,
        max_queue_size: int,
        prefix_cache: bool = True,
    ) -> None:
        self.pool = pool
        self.block_size = block_size
        self.max_batch_size = max_batch_size
        self.max_tokens_per_step = max_tokens_per_step
        self.max_tokens_per_mixed_step = min(max_tokens_per_step, max_tokens_per_mixed_step)
        self.max_queue_size = max_queue_size
        self.prefix_cache = prefix_cache
        self.waiting: list[Sequence] = []  # sorted by urgency, then arrival
        self.running: list[Sequence] = []  # in order of admission
        self._seats = list(range(max_batch_size - 1, -1, -1))  # those that are free

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
        """Choose the next pass and give its sequences the blocks that they write to. Empty when nothing is to do.

        Chunks of decoding sequences come first.
        """
        self._preempt_less_urgent()
        chunks = [self._extend(s, 1) for s in self.running if s.decodes and s.remaining]
        budget = self.max_tokens_per_step
        if chunks:
            budget = self.max_tokens_per_mixed_step
            budget = max(budget - decode_room(len(chunks), self.max_batch_size), budget // 2, 1)
        prompts = [s for s in self.running if not s.decodes]
        most = len(chunks) + MIXED_PROMPTS if chunks else self.max_batch_size
        while budget and len(chunks) < most and (prompts or self._admit_next()):
            sequence = prompts.pop(0) if prompts else self.running[-1]
            chunks.append(self._extend(sequence, budget))
            budget -= chunks[-1].length
        return chunks

    def launched(self, chunks: list[Chunk]) -> None:
        """Note that a pass computes these chunks."""
        for chunk in chunks:
            sequence = chunk.sequence
            sequence.computed = chunk.end
            sequence.entered, sequence.decodes = True, chunk.samples
            sequence.pending += chunk.samples
            sequence.in_flight += 1
            if chunk.thins:
                self._move(sequence)

    def withdraw(self, sequence: Sequence, chunks: list[Chunk]) -> None:
        """Note that a sequence has got tokens behind its last sampled one: a later pass is to compute them.

        Args:
            chunks: of the pass that has been launched since; there the sequence samples no more.
        """
        sequence.decodes = False
        for place, chunk in enumerate(chunks):
            if chunk.sequence is sequence:
                chunks[place] = replace(chunk, samples=False)
                sequence.pending -= chunk.samples

    def complete(self, chunk: Chunk) -> None:
        """Note that the chunk's keys and values are written, and name the blocks that are full now."""
        sequence = chunk.sequence
        sequence.in_flight -= 1
        sequence.pending -= chunk.samples
        if sequence.seat is None or sequence.thinned:  # it has given the blocks of this pass back
            return
        self._publish(sequence, chunk.end)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence, wherever it is, and give back its blocks and its seat."""
        sequence.gone = True
        if sequence in self.running:
            self.running.remove(sequence)
            self._release(sequence)
        else:
            self.waiting.remove(sequence)

    def check_integrity(self) -> None:
        """See `BlockPool.check_integrity`; also that waiting sequences hold nothing and running ones enough."""
        self.pool.check_integrity([sequence.blocks + sequence.thin_blocks for sequence in self])
        if any(sequence.blocks for sequence in self.waiting):
            raise RuntimeError("a waiting sequence holds blocks")
        if any(len(s.blocks) * self.block_size < s.computed - s.dropped for s in self.running):
            raise RuntimeError("a running sequence has computed more tokens than its blocks hold")
        taken = [-1 if sequence.seat is None else sequence.seat for sequence in self.running]
        if sorted([*self._seats, *taken]) != list(range(self.max_batch_size)):
            raise RuntimeError("the seats are not exactly those that are free and those of running sequences")

    def _enqueue(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)
        self.waiting.sort(key=lambda s: (s.request.sampling.priority, s.request.arrival))

    def _extend(self, sequence: Sequence, budget: int) -> Chunk:
        start = sequence.computed
        length = min(sequence.remaining, budget)
        if sequence.to_thin:  # what follows the prompt sees the keys that are left
            length = min(length, sequence.prompt_length - start)
        end = start + length
        sequence.blocks += self.pool.allocate(self._blocks(end - sequence.dropped) - len(sequence.blocks))
        thins = sequence.to_thin and end == sequence.prompt_length
        if thins:
            sequence.thin_blocks = self.pool.allocate(self._blocks(end - sequence.superfluous))
        return Chunk(sequence, start, length, end == sequence.length, not sequence.entered, sequence.decodes, thins)

    def _move(self, sequence: Sequence) -> None:
        """Go over to the blocks of a prompt that has been thinned out; the others stay for whoever begins alike.

        They are named before they are known to be written: who finds them is launched later.
        """
        self._publish(sequence, sequence.prompt_length)
        self.pool.release(sequence.blocks)
        sequence.blocks, sequence.thin_blocks = sequence.thin_blocks, []
        sequence.thinned, sequence.dropped, sequence.attention = True, sequence.superfluous, None

    def _publish(self, sequence: Sequence, end: int) -> None:
        """Name the content of full blocks up to token `end`."""
        if not self.prefix_cache:
            return
        for index in range(sequence.published, min(end, sequence.nameable) // self.block_size):
            self.pool.publish(sequence.blocks[index], sequence.key(index, self.block_size))
            sequence.published = index + 1

    def _lacks(self, sequence: Sequence) -> int:
        """Blocks that are missing before a waiting sequence can be admitted; at most 0 when it can."""
        cached = self._cached_blocks(sequence)
        needed = self._worst_case(sequence) - len(cached) + self.pool.count_idle(cached)
        return needed - self.pool.available + sum(map(self._outstanding, self.running))

    def _admit_next(self) -> bool:
        """Let the first waiting sequence run, on top of the blocks that are computed already, if there is room."""
        if not self.waiting or not self._seats or self.waiting[0].in_flight or self._lacks(self.waiting[0]) > 0:
            return False
        sequence = self.waiting.pop(0)
        sequence.seat = self._seats.pop()
        sequence.blocks = self._cached_blocks(sequence)
        self.pool.take(sequence.blocks)
        sequence.published = len(sequence.blocks)
        sequence.computed = sequence.published * self.block_size
        if sequence.scheduled_at is None:
            sequence.scheduled_at = time.monotonic()
            sequence.cached_tokens = sequence.computed
        self.running.append(sequence)
        return True

    def _preempt_less_urgent(self) -> None:
        """Where the first waiting sequence finds no room, push out less urgent ones, if that makes enough."""
        if not self.waiting or self.waiting[0].in_flight:
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
        # A pass in flight may still write to the blocks: whatever is launched later comes after it.
        self.pool.release(sequence.blocks + sequence.thin_blocks)
        if sequence.seat is not None:
            self._seats.append(sequence.seat)
        sequence.blocks, sequence.thin_blocks, sequence.seat = [], [], None
        sequence.entered = sequence.decodes = sequence.thinned = False
        sequence.computed = sequence.published = sequence.dropped = 0
        sequence.attention = None

    def _cached_blocks(self, sequence: Sequence) -> list[int]:
        """Blocks that hold the sequence's beginning."""
        if not self.prefix_cache:
            return []
        count = sequence.reusable // self.block_size
        return self.pool.match([sequence.key(index, self.block_size) for index in range(count)])

    def _blocks(self, tokens: int) -> int:
        return -(-tokens // self.block_size)

    def _worst_case(self, sequence: Sequence) -> int:
        # The last token's keys and values are never needed, so max_length - 1 tokens are stored at the most.
        stored = max(sequence.max_length - 1, sequence.prompt_length)
        if sequence.to_thin:  # for a moment it holds the whole prompt and what is left of it
            return self._blocks(sequence.prompt_length) + self._blocks(stored - sequence.superfluous)
        return self._blocks(stored - sequence.dropped)

    def _outstanding(self, sequence: Sequence) -> int:
        return self._worst_case(sequence) - len(sequence.blocks) - len(sequence.thin_blocks)
