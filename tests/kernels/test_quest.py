"""Quest page selection against the reference and the definition, and attention to the selected blocks."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from autoglm.kernels.base import AttentionMetadata, LayerCache, PageSelection
from autoglm.kernels.gpu.decode_attention import decode_attention
from autoglm.kernels.gpu.quest import SMALL, TILE, select_pages
from autoglm.kernels.reference import attention as reference_attention
from autoglm.kernels.reference import sparse as reference
from autoglm.kernels.reference.attention import dequantize_kv, gather_angles, rotate
from tests.kernels.attention_cases import AttentionShape, PagedSequences, make_config, make_qkv
from tests.kernels.device import DEVICE

SHAPES = {
    "plain": AttentionShape(),
    "one-kv-head": AttentionShape(num_heads=6, kv_heads=1, head_dim=16, sections=(1, 1, 2)),
    "9b": AttentionShape(num_heads=32, kv_heads=2, head_dim=128, sections=(8, 12, 12)),
}
BLOCK_SIZE = 4
SEQ_LENS, NUM_KEPT = [100, 0, 37, 5, 289], [3, 7, 9, 2, 0]  # NUM_KEPT is by slot
# Many tiles, and sequences on both sides of SMALL blocks.
LONG_SEQ_LENS = [3 * SMALL * BLOCK_SIZE, 0, 4 * TILE * BLOCK_SIZE + 6, SMALL * BLOCK_SIZE, SMALL * BLOCK_SIZE + 1]
LONG_NUM_KEPT = [70, 5, 40, 300, 400]
TOLERANCE = {"fp32": 2e-5, "bf16": 2e-2}
stored_dtypes = pytest.mark.parametrize("stored", ["fp32", "bf16"])
lengths = pytest.mark.parametrize("long", [False, True], ids=["short", "long"])


class Case:
    """Sequences whose blocks from the third to the last but one are visual, except every seventh.

    The third of the short sequences has no visual blocks.
    """

    def __init__(self, name: str, stored: str, num_partials: int = 1, long: bool = False) -> None:
        self.lengths, self.kept_counts = (LONG_SEQ_LENS, LONG_NUM_KEPT) if long else (SEQ_LENS, NUM_KEPT)
        self.shape, rows = SHAPES[name], len(self.lengths)
        self.dtype = torch.float32 if stored == "fp32" else torch.bfloat16
        self.paged = PagedSequences.make(
            self.shape, self.lengths, BLOCK_SIZE, stored, num_written=[max(0, n - 1) for n in self.lengths]
        )
        self.qkv = make_qkv(self.shape, rows, num_partials, self.dtype)
        self.positions = torch.randint(0, 64, (3, rows), dtype=torch.int32, device=DEVICE)
        self.config = make_config(self.shape, self.dtype)
        self.slots = torch.tensor([4, 1, 0, 2, 3], dtype=torch.int32, device=DEVICE)
        self.visual_blocks = torch.zeros(rows, self.paged.block_table.shape[1], dtype=torch.int32, device=DEVICE)
        for row, (slot, length) in enumerate(zip(self.slots.tolist(), self.lengths, strict=True)):
            visual = [i for i in range(2, -(-length // BLOCK_SIZE) - 1) if i % 7 and (long or row != 2)]
            self.visual_blocks[slot, visual] = 1
        self.num_kept = torch.tensor(self.kept_counts, dtype=torch.int32, device=DEVICE)
        blocks = self.paged.cache.keys.view(-1, BLOCK_SIZE, self.shape.kv_heads, self.shape.head_dim)
        self.key_bounds = torch.stack((blocks.amin(1), blocks.amax(1)), 2)

    @property
    def metadata(self) -> AttentionMetadata:
        return AttentionMetadata(self.positions, self.paged.block_table, self.paged.seq_lens)

    @property
    def selection(self) -> dict[str, Any]:
        """The arguments of `select_pages`."""
        return {
            "qkv": self.qkv,
            "cache": replace(self.paged.cache, key_bounds=self.key_bounds),
            "metadata": self.metadata,
            "pages": PageSelection(self.slots, self.visual_blocks, self.num_kept),
            "config": self.config,
        }

    def attention(self, cache: LayerCache, metadata: AttentionMetadata) -> dict[str, Any]:
        """The arguments of `decode_attention`."""
        return {"qkv": self.qkv, "cache": cache, "metadata": metadata, "config": self.config}

    def rotated_query(self, row: int, head: int) -> torch.Tensor:
        """The query heads of a KV head, fp32 [group, head_dim]."""
        q = self.qkv.float().sum(0)[row : row + 1].view(1, -1, self.shape.head_dim)[:, : self.shape.num_heads]
        q = rotate(q, gather_angles(self.config, self.positions[:, row : row + 1])).to(self.dtype).float()
        return q.view(self.shape.kv_heads, -1, self.shape.head_dim)[head]


def by_definition(case: Case, row: int, head: int) -> list[int]:
    """The selected blocks, from the larger product of each channel."""
    count, slot = -(-case.lengths[row] // BLOCK_SIZE), int(case.slots[row])
    blocks, visual = case.paged.block_table[row, :count].tolist(), case.visual_blocks[slot, :count].tolist()
    group = case.rotated_query(row, head)
    bounds = {}
    for index in (index for index in range(count) if visual[index]):
        minimum, maximum = case.key_bounds[blocks[index], head].float()
        bounds[index] = float(torch.maximum(group * minimum, group * maximum).sum())
    best = sorted(bounds, key=lambda index: -bounds[index])[: case.kept_counts[slot]]
    return [block for index, block in enumerate(blocks) if not visual[index] or index in best]


def check(case: Case) -> None:
    """The kernel and its reference select the blocks that the definition does."""
    for function in (select_pages, reference.select_pages):
        metadata = function(**case.selection)
        table, seq_lens = metadata.block_table, metadata.seq_lens
        for row, length in enumerate(case.lengths):
            for head in range(case.shape.kv_heads):
                expected = by_definition(case, row, head)
                assert table[row, head, : len(expected)].tolist() == expected
                assert int(seq_lens[row]) == length - (-(-length // BLOCK_SIZE) - len(expected)) * BLOCK_SIZE


@stored_dtypes
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("num_partials", [1, 3])
def test_blocks_are_selected_by_definition(name: str, stored: str, num_partials: int) -> None:
    check(Case(name, stored, num_partials))


@stored_dtypes
def test_many_blocks(stored: str) -> None:
    check(Case("plain", stored, long=True))


@lengths
def test_bounds_of_both_signs(long: bool) -> None:
    case = Case("plain", "fp32", long=long)
    case.key_bounds = torch.randn_like(case.key_bounds[:, :, :1]) + torch.tensor([[-0.1], [0.1]], device=DEVICE)
    check(case)


def one_channel(long: bool) -> Case:
    """Bounds without rounding errors: twice the maximum of the first channel."""
    case = Case("plain", "fp32", long=long)
    case.qkv.fill_(0)
    case.qkv[..., : case.shape.num_heads * case.shape.head_dim : case.shape.head_dim] = 1
    case.positions.fill_(0)  # no rotation
    return case


@lengths
@pytest.mark.parametrize("num_values", [2, 8, 1000])
def test_bounds_that_differ_in_their_last_bits(num_values: int, long: bool) -> None:
    case = one_channel(long)
    for sign in (1, -1):
        steps = torch.randint(0, num_values, case.key_bounds[:, :, :1].shape, device=DEVICE)
        case.key_bounds = sign * (1 + steps * 2.0**-23).repeat(1, 1, 2, 1)
        check(case)


@lengths
@pytest.mark.parametrize("bound", [0.0, -1.0, 3.5])
def test_ties_go_to_the_first_block(bound: float, long: bool) -> None:
    """All bounds equal; then two values, so that all blocks with the larger and some with the smaller are kept."""
    case = one_channel(long)
    case.key_bounds.fill_(bound)
    check(case)
    table = case.paged.block_table
    few = table[:, 40:42].flatten() if long else table[:, 10]
    case.key_bounds[few[few < len(case.key_bounds)].long()] += 1
    check(case)


@stored_dtypes
@pytest.mark.parametrize("name", SHAPES)
def test_attention_to_selected_blocks(name: str, stored: str) -> None:
    case = Case(name, stored)
    metadata = select_pages(**case.selection)
    table, seq_lens = metadata.block_table, metadata.seq_lens
    ours, theirs = case.paged.copy().cache, case.paged.copy().cache
    found = decode_attention(**case.attention(ours, metadata))
    for row, length in enumerate(seq_lens.tolist()):
        table[row, :, -(-length // BLOCK_SIZE) :] = 0  # the reference reads blocks past the end and masks them
    expected = reference_attention.decode_attention(**case.attention(theirs, metadata))
    torch.testing.assert_close(found, expected, rtol=TOLERANCE[stored], atol=TOLERANCE[stored])
    for head in range(case.shape.kv_heads):  # the reference against attention to gathered keys
        offsets = torch.arange(BLOCK_SIZE, device=DEVICE)
        slots = (table[4, head, :, None].long() * BLOCK_SIZE + offsets).flatten()[: seq_lens[4]]
        key, value = (t[:, head].float() for t in dequantize_kv(theirs, slots, case.dtype))
        size = case.shape.head_dim
        mixed = (case.rotated_query(4, head) @ key.T * size**-0.5).softmax(-1) @ value
        per_head = expected[4].view(case.shape.kv_heads, -1, size)[head].float()
        torch.testing.assert_close(per_head, mixed, rtol=TOLERANCE[stored], atol=TOLERANCE[stored])


@stored_dtypes
def test_keeping_all_blocks_equals_dense_attention_bit_for_bit(stored: str) -> None:
    case = Case("plain", stored)
    case.num_kept.fill_(2**30)
    metadata = select_pages(**case.selection)
    table, seq_lens = metadata.block_table, metadata.seq_lens
    assert torch.equal(seq_lens, case.paged.seq_lens)
    dense, sparse = case.paged.copy(), case.paged.copy()
    expected = decode_attention(**case.attention(dense.cache, case.metadata))
    assert torch.equal(decode_attention(**case.attention(sparse.cache, metadata)), expected)
    for row, count in enumerate(-(-length // BLOCK_SIZE) for length in SEQ_LENS):
        assert torch.equal(table[row, :, :count], case.paged.block_table[row, :count].expand(case.shape.kv_heads, -1))
