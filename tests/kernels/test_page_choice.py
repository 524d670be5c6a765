"""The choice of blocks against its twin and against bounds by definition; the attention over what was chosen."""

import pytest
import torch

from autoglm.kernels import reference_sparse as twin
from autoglm.kernels.decode_attention import decode_attention
from autoglm.kernels.page_choice import choose_pages
from autoglm.kernels.reference_attention import decode, gather_angles, rotate
from autoglm.kernels.reference_attention import decode_attention as decode_twin
from tests.kernels.attention_cases import Heads, Paged, make_qkv, make_rotary

SHAPES = {
    "plain": Heads(),
    "one-kv-head": Heads(heads=6, kv_heads=1, size=16, section=(1, 1, 2)),
    "9b": Heads(heads=32, kv_heads=2, size=128, section=(8, 12, 12)),
}
LENGTHS = [100, 0, 37, 5, 289]
KEPT = [3, 7, 9, 2, 0]  # by seat
BLOCK = 4
TOLERANCE = {"fp32": 2e-5, "bf16": 2e-2}


class Case:
    """Sequences of LENGTHS whose blocks 2 to the last but one are visual, but for every seventh and the third's."""

    def __init__(self, name: str, stored: str, device: torch.device, splits: int = 1) -> None:
        torch.manual_seed(0)
        self.shape, rows = SHAPES[name], len(LENGTHS)
        self.dtype = torch.float32 if stored == "fp32" else torch.bfloat16
        self.paged = Paged.make(self.shape, LENGTHS, BLOCK, stored, device, [max(0, n - 1) for n in LENGTHS])
        self.qkv = make_qkv(self.shape, rows, splits, self.dtype, device)
        self.positions = torch.randint(0, 64, (3, rows), dtype=torch.int32, device=device)
        self.rotary = make_rotary(self.shape, device)
        self.seats = torch.tensor([4, 1, 0, 2, 3], dtype=torch.int32, device=device)
        self.visual = torch.zeros(rows, self.paged.table.shape[1], dtype=torch.int32, device=device)
        for row, (seat, length) in enumerate(zip(self.seats.tolist(), LENGTHS, strict=True)):
            places = [p for p in range(2, -(-length // BLOCK) - 1) if p % 7 and row != 2]
            self.visual[seat, places] = 1
        self.kept = torch.tensor(KEPT, dtype=torch.int32, device=device)
        blocks = self.paged.cache.keys.view(-1, BLOCK, self.shape.kv_heads, self.shape.size)
        self.summaries = torch.stack((blocks.amin(1), blocks.amax(1)), 2)

    @property
    def arguments(self) -> tuple[object, ...]:
        table, lengths = self.paged.table, self.paged.lengths
        chosen_by = self.seats, self.visual, self.kept
        return (
            self.qkv,
            self.positions,
            self.rotary,
            self.summaries,
            table,
            lengths,
            *chosen_by,
            BLOCK,
            self.shape.heads,
        )


def by_definition(case: Case, row: int, head: int) -> list[int]:
    """The blocks that stay, from each channel's larger product in plain loops."""
    count, seat = -(-LENGTHS[row] // BLOCK), int(case.seats[row])
    blocks, visual = case.paged.table[row, :count].tolist(), case.visual[seat, :count].tolist()
    q = case.qkv.float().sum(0)[row].view(-1, case.shape.size)[: case.shape.heads]
    q = rotate(q[None], gather_angles(case.rotary, case.positions[:, row : row + 1]))[0].to(case.dtype).float()
    group = q.view(case.shape.kv_heads, -1, case.shape.size)[head]
    bounds = {}
    for place in (place for place in range(count) if visual[place]):
        least, greatest = case.summaries[blocks[place], head].float()
        bounds[place] = float(torch.maximum(group * least, group * greatest).sum())
    best = sorted(bounds, key=lambda place: -bounds[place])[: KEPT[seat]]
    return [block for place, block in enumerate(blocks) if not visual[place] or place in best]


@pytest.mark.parametrize("stored", ["fp32", "bf16"])
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("splits", [1, 3])
def test_kernel_and_twin_choose_by_definition(name: str, stored: str, splits: int, device: torch.device) -> None:
    case = Case(name, stored, device, splits)
    for function in (choose_pages, twin.choose_pages):
        table, lengths = function(*case.arguments)  # type: ignore[arg-type]
        for row, length in enumerate(LENGTHS):
            for head in range(case.shape.kv_heads):
                expected = by_definition(case, row, head)
                assert table[row, head, : len(expected)].tolist() == expected
                assert int(lengths[row]) == length - (-(-length // BLOCK) - len(expected)) * BLOCK


def test_of_equal_bounds_the_first_stay(device: torch.device) -> None:
    case = Case("plain", "fp32", device)
    case.summaries.fill_(0)
    for function in (choose_pages, twin.choose_pages):
        table, _ = function(*case.arguments)  # type: ignore[arg-type]
        for row, expected in ((0, [0, 1, 7, 14]), (4, [0, 1, 2, 3, 7, 14])):  # which keep none, and two
            assert torch.equal(table[row, 1, : len(expected)], case.paged.table[row, expected])


@pytest.mark.parametrize("stored", ["fp32", "bf16"])
@pytest.mark.parametrize("name", SHAPES)
def test_attention_over_chosen_blocks(name: str, stored: str, device: torch.device) -> None:
    case = Case(name, stored, device)
    table, lengths = choose_pages(*case.arguments)  # type: ignore[arg-type]
    ours, twins = case.paged.copy(), case.paged.copy()
    rest = case.shape.heads, case.dtype
    mixed = decode_attention(case.qkv, case.positions, case.rotary, ours.cache, table, lengths, *rest)
    for row, length in enumerate(lengths.tolist()):
        table[row, :, -(-length // BLOCK) :] = 0  # the twin reads what is behind the end, and drops it
    expected = decode_twin(case.qkv, case.positions, case.rotary, twins.cache, table, lengths, *rest)
    torch.testing.assert_close(mixed, expected, rtol=TOLERANCE[stored], atol=TOLERANCE[stored])
    for head in range(case.shape.kv_heads):  # and the twin against attention over gathered keys
        slots = (table[4, head, :, None].long() * BLOCK + torch.arange(BLOCK, device=device)).flatten()[: lengths[4]]
        key, value = (t[:, head].float() for t in decode(twins.cache, slots, case.dtype))
        q = case.qkv.float().sum(0)[4:5].view(1, -1, case.shape.size)[:, : case.shape.heads]
        q = rotate(q, gather_angles(case.rotary, case.positions[:, 4:5])).to(case.dtype).float()
        group = q.view(case.shape.kv_heads, -1, case.shape.size)[head]
        wanted = (group @ key.T * case.shape.size**-0.5).softmax(-1) @ value
        found = expected[4].view(case.shape.kv_heads, -1, case.shape.size)[head].float()
        torch.testing.assert_close(found, wanted, rtol=TOLERANCE[stored], atol=TOLERANCE[stored])


@pytest.mark.parametrize("stored", ["fp32", "bf16"])
def test_all_blocks_are_dense_attention_bit_for_bit(stored: str, device: torch.device) -> None:
    case = Case("plain", stored, device)
    case.kept.fill_(2**30)
    table, lengths = choose_pages(*case.arguments)  # type: ignore[arg-type]
    assert torch.equal(lengths, case.paged.lengths)
    dense, sparse = case.paged.copy(), case.paged.copy()
    rest = case.shape.heads, case.dtype
    head = case.qkv, case.positions, case.rotary
    expected = decode_attention(*head, dense.cache, dense.table, dense.lengths, *rest)
    assert torch.equal(decode_attention(*head, sparse.cache, table, lengths, *rest), expected)
    for row, count in enumerate(-(-length // BLOCK) for length in LENGTHS):
        assert torch.equal(table[row, :, :count], case.paged.table[row, :count].expand(case.shape.kv_heads, -1))
