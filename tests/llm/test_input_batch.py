"""The inputs of a pass, against an example written by hand."""

import numpy as np
import torch

from autoglm.llm.input_batch import (
    BatchShape,
    MixedInput,
    block_table_entries,
    make_rows,
    pack_mixed,
    row_indices,
    sequence_slots,
)
from autoglm.llm.scheduler import Chunk
from tests.llm.sequences import make_sequence

BLOCK_SIZE, PADDING_SLOT = 4, 6
DECODING = Chunk(
    make_sequence([1, 2, 3, 4, 5], answer=[50, 51], slot=2, blocks=[7, 3], next_position=3),
    start=6, length=1, samples=True, is_first=False, decodes=True,
)  # fmt: skip
MIDDLE = Chunk(  # of a prompt with an image of 2 x 2 tokens
    make_sequence(
        [10, 99, 99, 99, 99, 15], slot=0, blocks=[4, 9], next_position=4,
        positions=[[0, 1, 1, 1, 1, 3], [0, 1, 1, 2, 2, 3], [0, 1, 2, 1, 2, 3]],
    ),
    start=2, length=3, samples=False, is_first=False, decodes=False,
)  # fmt: skip
WHOLE = Chunk(make_sequence([20, 21, 22], slot=5, blocks=[1]), 0, 3, samples=True, is_first=True, decodes=False)
CHUNKS = [DECODING, MIDDLE, WHOLE]


def test_rows_describe_the_last_token_of_each_sequence() -> None:
    assert make_rows(CHUNKS, BLOCK_SIZE).tolist() == [
        [2, 0, 5],  # slots
        [7, 5, 3],  # keys
        [4, 2, 2],  # positions: next_position plus the index in the answer; not used within a prompt
        [3, 9, 1],  # blocks
        [2, -1, 0],  # tokens in the answer
    ]


def test_a_padded_mixed_pass() -> None:
    shape = BatchShape(num_decode_tokens=2, num_chunks=3, num_tokens=8)
    packed = pack_mixed(CHUNKS, shape, PADDING_SLOT, BLOCK_SIZE)
    given = MixedInput.unpack(torch.from_numpy(packed), shape)
    assert packed.dtype == np.int32
    assert given.rows.tolist() == [
        [2, PADDING_SLOT, 0, 5, PADDING_SLOT], [7, 0, 5, 3, 0], [4, 0, 2, 2, 0], [3, 0, 9, 1, 0], [2, 0, -1, 0, 0],
    ]  # fmt: skip
    assert given.ids.tolist() == [99, 99, 99, 20, 21, 22, 0, 0]
    assert given.positions.tolist() == [
        [4, 0, 1, 1, 1, 0, 1, 2, 0, 0], [4, 0, 1, 2, 2, 0, 1, 2, 0, 0], [4, 0, 2, 1, 2, 0, 1, 2, 0, 0],
    ]  # fmt: skip
    assert given.slot_mapping.tolist() == [-1, -1, 18, 19, 36, 4, 5, 6, -1, -1]
    assert given.cu_seqlens_q.tolist() == [0, 3, 6, 6]
    assert given.last_rows.tolist() == [0, 0, 4, 7, 0]
    assert given.sampling.tolist() == [[2, PADDING_SLOT, PADDING_SLOT, 5, PADDING_SLOT], [2, 0, 0, 0, 0]]
    assert all(part.data_ptr() % 16 == 0 for part in vars(given).values())


def test_positions_continue_after_the_prompt() -> None:
    """As in the chunk of a sequence that is recomputed after a preemption."""
    sequence = make_sequence([1, 2, 3], answer=[7, 8, 9], slot=0, blocks=[0, 1], next_position=8)
    chunk = Chunk(sequence, 1, 5, samples=True, is_first=True, decodes=False)
    shape = BatchShape.of([chunk])
    given = MixedInput.unpack(torch.from_numpy(pack_mixed([chunk], shape, PADDING_SLOT, BLOCK_SIZE)), shape)
    assert given.positions.tolist() == [[1, 2, 8, 9, 10]] * 3
    assert given.rows[:, 0].tolist() == [0, 6, 10, 1, 3]


def test_row_indices_skip_the_padding() -> None:
    assert row_indices(CHUNKS, BatchShape.of(CHUNKS)) == [0, 1, 2]
    assert row_indices(CHUNKS, BatchShape(4, 8, 64)) == [0, 4, 5]
    assert row_indices(CHUNKS[:1], BatchShape(4, 0, 0)) == [0]


def test_a_shape_fits_smaller_ones() -> None:
    assert BatchShape.of(CHUNKS) == BatchShape(1, 2, 6)
    shape = BatchShape(2, 3, 8)
    assert shape.fits(shape) and shape.fits(BatchShape.of(CHUNKS)) and shape.fits(BatchShape(0, 0, 0))
    assert not any(shape.fits(larger) for larger in (BatchShape(3, 3, 8), BatchShape(2, 4, 8), BatchShape(2, 3, 9)))


def test_block_tables_of_prompts_are_sent() -> None:
    indices, blocks = block_table_entries(CHUNKS, max_blocks=10)
    assert indices.tolist() == [0, 1, 50]
    assert blocks.tolist() == [4, 9, 1]


def test_cache_indices_of_a_sequence() -> None:
    assert sequence_slots(MIDDLE.sequence, BLOCK_SIZE, 2, 6).tolist() == [18, 19, 36, 37]
