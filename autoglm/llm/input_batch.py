"""The inputs of one forward pass: assembled on the host, sent to the device in one copy."""

import math
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import torch

from autoglm.kernels.base import AttentionMetadata, PageSelection
from autoglm.llm.scheduler import Chunk
from autoglm.llm.sequence import Sequence
from autoglm.llm.transfer import Int32Array, aligned

ROW = 5  # values in a row, see `make_rows`


@dataclass(frozen=True)
class InputBatch:
    """T tokens, packed: first one token for each decoding sequence, then the chunks of prompts.

    All tensors are on the model's device. In a captured pass they belong to its CUDA graph.

    positions: int32 [3, T], of all tokens.
    pages: None if decoding sequences attend to all blocks, as they always do in the first `dense_layers`.
    """

    positions: torch.Tensor
    decode: AttentionMetadata | None = None
    prefill: AttentionMetadata | None = None
    pages: PageSelection | None = None
    dense_layers: int = 0


def make_rows(chunks: Seq[Chunk], block_size: int) -> Int32Array:
    """int32 [ROW, n]: each sequence's slot, length including this pass, position and block of its last token, and
    number of answer tokens."""
    rows = np.empty((ROW, len(chunks)), np.int32)
    for column, chunk in enumerate(chunks):
        sequence, step = chunk.sequence, chunk.end - chunk.sequence.prompt_length
        block = sequence.blocks[(chunk.end - 1) // block_size]
        rows[:, column] = sequence.slot, chunk.end, sequence.prompt.next_position + step - 1, block, step
    return rows


@dataclass(frozen=True, order=True)
class BatchShape:
    """The capacity of a mixed pass: decoding sequences, chunks of prompts, tokens of all chunks."""

    num_decode_tokens: int
    num_chunks: int
    num_tokens: int

    @classmethod
    def of(cls, chunks: Seq[Chunk]) -> "BatchShape":
        """The smallest shape that fits."""
        lengths = [chunk.length for chunk in chunks if not chunk.decodes]
        return cls(len(chunks) - len(lengths), len(lengths), sum(lengths))

    def fits(self, other: "BatchShape") -> bool:
        """Whether a pass of the other shape can be padded to this one."""
        return (
            self.num_decode_tokens >= other.num_decode_tokens
            and self.num_chunks >= other.num_chunks
            and self.num_tokens >= other.num_tokens
        )


@dataclass(frozen=True)
class MixedInput:
    """The inputs of a mixed pass, int32 on the device. The excess of its shape is padding."""

    rows: torch.Tensor  # [ROW, decode + chunks], see `make_rows`; length 0 is padding
    ids: torch.Tensor  # [tokens] of the chunks
    positions: torch.Tensor  # [3, decode + tokens]
    slot_mapping: torch.Tensor  # [decode + tokens], -1 for padding and for decoding sequences
    cu_seqlens_q: torch.Tensor  # [chunks + 1]
    last_rows: torch.Tensor  # [decode + chunks], the row of each sequence's last token
    sampling: torch.Tensor  # [2, decode + chunks], slots and steps; rows that do not sample have the padding slot

    @classmethod
    def unpack(cls, packed: torch.Tensor, shape: BatchShape) -> "MixedInput":
        """Views of an array made by `pack_mixed`."""
        parts, start = [], 0
        for size in _layout(shape):
            parts.append(packed[start : start + math.prod(size)].view(size))
            start += aligned(math.prod(size))
        return cls(*parts)


def pack_mixed(chunks: Seq[Chunk], shape: BatchShape, padding_slot: int, block_size: int) -> Int32Array:
    """The `MixedInput` of these chunks, padded to `shape`, as one array."""
    sizes = _layout(shape)
    packed = np.zeros(sum(aligned(math.prod(size)) for size in sizes), np.int32)
    parts, start = [], 0
    for size in sizes:
        parts.append(packed[start : start + math.prod(size)].reshape(size))
        start += aligned(math.prod(size))
    rows, ids, positions, slot_mapping, cu_seqlens_q, last_rows, sampling = parts
    slot_mapping.fill(-1)
    rows[0] = sampling[0] = padding_slot
    indices = row_indices(chunks, shape)
    used = make_rows(chunks, block_size)
    rows[:, indices] = used
    samples = [index for index, chunk in zip(indices, chunks, strict=True) if chunk.samples]
    sampling[:, samples] = rows[[0, 4]][:, samples]
    prompts = [chunk for chunk in chunks if not chunk.decodes]
    num_decode = len(chunks) - len(prompts)
    last_rows[:num_decode] = np.arange(num_decode)
    positions[:, :num_decode] = used[2, :num_decode]
    offset = 0
    for number, chunk in enumerate(prompts):
        target = slice(shape.num_decode_tokens + offset, shape.num_decode_tokens + offset + chunk.length)
        ids[offset : offset + chunk.length] = chunk.sequence.token_ids[chunk.start : chunk.end]
        positions[:, target] = _positions(chunk)
        slot_mapping[target] = sequence_slots(chunk.sequence, block_size, chunk.start, chunk.end)
        offset += chunk.length
        cu_seqlens_q[number + 1 :] = offset
        last_rows[shape.num_decode_tokens + number] = target.stop - 1
    return packed


def row_indices(chunks: Seq[Chunk], shape: BatchShape) -> list[int]:
    """The row of each chunk's sequence in a pass of this shape: decoding sequences first, then the chunks."""
    num_decode = sum(chunk.decodes for chunk in chunks)
    first_chunk = shape.num_decode_tokens
    return [*range(num_decode), *range(first_chunk, first_chunk + len(chunks) - num_decode)]


def block_table_entries(chunks: Seq[Chunk], max_blocks: int) -> list[Int32Array]:
    """The blocks of prompts, and before them their indices in the flattened block tables of all slots."""
    prompts = [chunk.sequence for chunk in chunks if not chunk.decodes]
    starts = [(sequence.slot or 0) * max_blocks for sequence in prompts]
    indices = [np.arange(s, s + len(p.blocks), dtype=np.int32) for s, p in zip(starts, prompts, strict=True)]
    return [np.concatenate(indices), np.concatenate([np.array(p.blocks, np.int32) for p in prompts])]


def sequence_slots(sequence: Sequence, block_size: int, start: int, end: int) -> Int32Array:
    """The indices in the cache of the sequence's tokens from `start` to `end`."""
    indices = np.arange(start, end)
    blocks = np.array(sequence.blocks, np.int32)
    return blocks[indices // block_size] * block_size + indices % block_size  # type: ignore[no-any-return]


def _layout(shape: BatchShape) -> list[tuple[int, ...]]:
    """The sizes of the parts of a `MixedInput`."""
    sequences = shape.num_decode_tokens + shape.num_chunks
    tokens = shape.num_decode_tokens + shape.num_tokens
    return [
        (ROW, sequences), (shape.num_tokens,), (3, tokens), (tokens,), (shape.num_chunks + 1,), (sequences,),
        (2, sequences),
    ]  # fmt: skip


def _positions(chunk: Chunk) -> Int32Array:
    """[3, chunk.length]: the prompt's positions, then consecutive ones for tokens of the answer."""
    sequence, prompt = chunk.sequence, chunk.sequence.prompt
    of_prompt = prompt.positions[:, chunk.start : chunk.end].numpy()
    shift = prompt.next_position - sequence.prompt_length
    of_answer = np.arange(max(chunk.start, sequence.prompt_length), chunk.end, dtype=np.int32) + shift
    return np.concatenate([of_prompt, np.broadcast_to(of_answer, (3, len(of_answer)))], axis=1)
