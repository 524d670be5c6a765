"""What one forward pass needs to know: written down on the host, sent to the device by one copy."""

import math
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import torch

from autoglm.llm.scheduler import Chunk
from autoglm.llm.sequence import Sequence
from autoglm.llm.transfer import Numbers, aligned

ROW = 5  # numbers in a row, see `make_rows`


@dataclass(frozen=True)
class Pages:
    """By what decoding sequences choose blocks, see `Kernels.choose_pages`; the first `dense_layers` see all."""

    seats: torch.Tensor  # int32 [singles]
    visual: torch.Tensor  # int32 [seats, max_blocks]
    kept: torch.Tensor  # int32 [seats]
    dense_layers: int


@dataclass(frozen=True)
class Batch:
    """T tokens of n sequences, packed: first the single tokens of decoding sequences, then the chunks of prompts.

    All tensors lie on the model's device. In a pass that is captured in a graph they are the graph's own.
    """

    singles: int
    positions: torch.Tensor  # int32 [3, T]
    slots: torch.Tensor  # int64 [T], where the cache keeps each token; nobody reads the singles'
    block_table: torch.Tensor  # int32 [n, max_blocks], the singles' sequences first
    lengths: torch.Tensor  # int32 [n], keys that each sequence has after this pass; 0 for rows that only pad
    starts: torch.Tensor  # int32 [n - singles + 1], where each chunk begins behind the singles, then T - singles
    longest_chunk: int  # 0 without chunks
    pages: Pages | None = None  # None: decoding sequences look at all blocks


def make_rows(chunks: Seq[Chunk], block_size: int) -> Numbers:
    """int32 [ROW, n]: each sequence's seat, keys with this pass, position and block of its last token, and how many
    tokens its answer has."""
    rows = np.empty((ROW, len(chunks)), np.int32)
    for column, chunk in enumerate(chunks):
        sequence, keys = chunk.sequence, chunk.end - chunk.sequence.dropped
        step = chunk.end - sequence.prompt_length
        block = sequence.blocks[(keys - 1) // block_size]
        rows[:, column] = sequence.seat, keys, sequence.next_position + step - 1, block, step
    return rows


@dataclass(frozen=True, order=True)
class Shape:
    """For how much a pass with prompts has room: decoding sequences, chunks of prompts, the chunks' tokens."""

    singles: int
    chunks: int
    tokens: int

    @classmethod
    def of(cls, chunks: Seq[Chunk]) -> "Shape":
        """What just holds these."""
        lengths = [chunk.length for chunk in chunks if not chunk.decodes]
        return cls(len(chunks) - len(lengths), len(lengths), sum(lengths))

    def holds(self, other: "Shape") -> bool:
        return self.singles >= other.singles and self.chunks >= other.chunks and self.tokens >= other.tokens


@dataclass(frozen=True)
class MixedInput:
    """What comes with a pass that has chunks, int32 on the device. What its shape has too much of only pads."""

    rows: torch.Tensor  # [ROW, singles + chunks], see `make_rows`; length 0 pads
    ids: torch.Tensor  # [tokens], the chunks'
    positions: torch.Tensor  # [3, singles + tokens]
    slots: torch.Tensor  # [singles + tokens], -1 for what pads and for the singles
    starts: torch.Tensor  # [chunks + 1], the chunks' first tokens, then their number
    last_rows: torch.Tensor  # [singles + chunks], where each sequence's last token lies in the pass
    sampling: torch.Tensor  # [2, singles + chunks], seats and steps; what is not to be sampled goes to the spare seat

    @classmethod
    def unpack(cls, packed: torch.Tensor, shape: Shape) -> "MixedInput":
        """The parts of what `pack_mixed` has made."""
        parts, start = [], 0
        for part in _layout(shape):
            parts.append(packed[start : start + math.prod(part)].view(part))
            start += aligned(math.prod(part))
        return cls(*parts)


def pack_mixed(chunks: Seq[Chunk], shape: Shape, spare_seat: int, block_size: int) -> Numbers:
    """A `MixedInput` of this shape, which holds the chunks, as one array."""
    sizes = _layout(shape)
    packed = np.zeros(sum(aligned(math.prod(size)) for size in sizes), np.int32)
    parts, start = [], 0
    for size in sizes:
        parts.append(packed[start : start + math.prod(size)].reshape(size))
        start += aligned(math.prod(size))
    rows, ids, positions, slots, starts, last_rows, sampling = parts
    slots.fill(-1)
    rows[0] = sampling[0] = spare_seat
    places = row_places(chunks, shape)
    made = make_rows(chunks, block_size)
    rows[:, places] = made
    samples = [place for place, chunk in zip(places, chunks, strict=True) if chunk.samples]
    sampling[:, samples] = rows[[0, 4]][:, samples]
    prompts = [chunk for chunk in chunks if not chunk.decodes]
    singles = len(chunks) - len(prompts)
    last_rows[:singles] = np.arange(singles)
    positions[:, :singles] = made[2, :singles]
    at = 0
    for number, chunk in enumerate(prompts):
        there = slice(shape.singles + at, shape.singles + at + chunk.length)
        ids[at : at + chunk.length] = chunk.sequence.tokens[chunk.start : chunk.end]
        positions[:, there] = _positions(chunk)
        slots[there] = key_slots(chunk.sequence, block_size, chunk.start, chunk.end)
        at += chunk.length
        starts[number + 1 :] = at
        last_rows[shape.singles + number] = there.stop - 1
    return packed


def row_places(chunks: Seq[Chunk], shape: Shape) -> list[int]:
    """Which of the shape's rows each chunk's sequence takes: decoding ones stand first, and so do their rows."""
    singles = sum(chunk.decodes for chunk in chunks)
    return [*range(singles), *range(shape.singles, shape.singles + len(chunks) - singles)]


def table_entries(chunks: Seq[Chunk], max_blocks: int) -> list[Numbers]:
    """Where the blocks of prompts stand in the flattened block tables of all seats, and these blocks."""
    prompts = [chunk.sequence for chunk in chunks if not chunk.decodes]
    starts = [(sequence.seat or 0) * max_blocks for sequence in prompts]
    places = [np.arange(s, s + len(p.blocks), dtype=np.int32) for s, p in zip(starts, prompts, strict=True)]
    return [np.concatenate(places), np.concatenate([np.array(p.blocks, np.int32) for p in prompts])]


def _layout(shape: Shape) -> list[tuple[int, ...]]:
    """Shapes of the parts of a `MixedInput`."""
    sequences, tokens = shape.singles + shape.chunks, shape.singles + shape.tokens
    return [
        (ROW, sequences), (shape.tokens,), (3, tokens), (tokens,), (shape.chunks + 1,), (sequences,), (2, sequences)
    ]  # fmt: skip


def _positions(chunk: Chunk) -> Numbers:
    """[3, chunk.length]: the prompt's own, then what follows from the index."""
    sequence = chunk.sequence
    of_prompt = sequence.positions[:, chunk.start : chunk.end].numpy()
    shift = sequence.next_position - sequence.prompt_length
    following = np.arange(max(chunk.start, sequence.prompt_length), chunk.end, dtype=np.int32) + shift
    return np.concatenate([of_prompt, np.broadcast_to(following, (3, len(following)))], axis=1)


def key_slots(sequence: Sequence, block_size: int, start: int, end: int) -> Numbers:
    """Where the cache keeps the sequence's tokens from `start` to `end`; none of them is among those dropped."""
    places = np.arange(start - sequence.dropped, end - sequence.dropped)
    blocks = np.array(sequence.blocks, np.int32)
    return blocks[places // block_size] * block_size + places % block_size  # type: ignore[no-any-return]
