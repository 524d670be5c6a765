"""The choice of blocks against its twin and against bounds by definition; the attention over what was chosen."""

import pytest
import torch

from autoglm.kernels.gpu.decode_attention import decode_attention
from autoglm.kernels.gpu.quest import FEW, TILE, choose_pages
from autoglm.kernels.reference import sparse as twin
from autoglm.kernels.reference.attention import decode, gather_angles, rotate
from autoglm.kernels.reference.attention import decode_attention as decode_twin
from tests.kernels.attention_cases import Heads, Paged, make_qkv, make_rotary

SHAPES = {
    "plain": Heads(),
    "one-kv-head": Heads(heads=6, kv_heads=1, size=16, section=(1, 1, 2)),
    "9b": Heads(heads=32, kv_heads=2, size=128, section=(8, 12, 12)),
}
BLOCK = 4
LENGTHS = [100, 0, 37, 5, 289]
LONG = [3 * FEW * BLOCK, 0, 4 * TILE * BLOCK + 6, FEW * BLOCK, FEW * BLOCK + 1]  # many tiles; both sizes of the search
KEPT = [3, 7, 9, 2, 0]  # by seat
MANY = [70, 5, 40, 300, 400]
TOLERANCE = {"fp32": 2e-5, "bf16": 2e-2}


class Case:
    """Sequences whose blocks 2 to the last but one are visual, but for every seventh and all of the third's if these
    are few."""

    def __init__(self, name: str, stored: str, device: torch.device, splits: int = 1, long: bool = False) -> None:
        torch.manual_seed(0)
        self.lengths, self.wanted = (LONG, MANY) if long else (LENGTHS, KEPT)
        self.shape, rows = SHAPES[name], len(self.lengths)
        self.dtype = torch.float32 if stored == "fp32" else torch.bfloat16
        self.paged = Paged.make(self.shape, self.lengths, BLOCK, stored, device, [max(0, n - 1) for n in self.lengths])
        self.qkv = make_qkv(self.shape, rows, splits, self.dtype, device)
        self.positions = torch.randint(0, 64, (3, rows), dtype=torch.int32, device=device)
        self.rotary = make_rotary(self.shape, device)
        self.seats = torch.tensor([4, 1, 0, 2, 3], dtype=torch.int32, device=device)
        self.visual = torch.zeros(rows, self.paged.table.shape[1], dtype=torch.int32, device=device)
        for row, (seat, length) in enumerate(zip(self.seats.tolist(), self.lengths, strict=True)):
            places = [p for p in range(2, -(-length // BLOCK) - 1) if p % 7 and (long or row != 2)]
            self.visual[seat, places] = 1
        self.kept = torch.tensor(self.wanted, dtype=torch.int32, device=device)
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
    count, seat = -(-case.lengths[row] // BLOCK), int(case.seats[row])
    blocks, visual = case.paged.table[row, :count].tolist(), case.visual[seat, :count].tolist()
    q = case.qkv.float().sum(0)[row].view(-1, case.shape.size)[: case.shape.heads]
    q = rotate(q[None], gather_angles(case.rotary, case.positions[:, row : row + 1]))[0].to(case.dtype).float()
    group = q.view(case.shape.kv_heads, -1, case.shape.size)[head]
    bounds = {}
    for place in (place for place in range(count) if visual[place]):
        least, greatest = case.summaries[blocks[place], head].float()
        bounds[place] = float(torch.maximum(group * least, group * greatest).sum())
    best = sorted(bounds, key=lambda place: -bounds[place])[: case.wanted[seat]]
    return [block for place, block in enumerate(blocks) if not visual[place] or place in best]


@pytest.mark.parametrize("stored", ["fp32", "bf16"])
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("splits", [1, 3])
def test_kernel_and_twin_choose_by_definition(name: str, stored: str, splits: int, device: torch.device) -> None:
    check(Case(name, stored, device, splits))


@pytest.mark.parametrize("stored", ["fp32", "bf16"])
def test_many_blocks(stored: str, device: torch.device) -> None:
    check(Case("plain", stored, device, long=True))


@pytest.mark.parametrize("long", [False, True])
def test_bounds_of_both_signs(long: bool, device: torch.device) -> None:
    case = Case("plain", "fp32", device, long=long)
    case.summaries = torch.randn_like(case.summaries[:, :, :1]) + torch.tensor([[-0.1], [0.1]], device=device)
    check(case)


def check(case: Case) -> None:
    """The kernel and its twin choose what is chosen by definition."""
    for function in (choose_pages, twin.choose_pages):
        table, lengths = function(*case.arguments)  # type: ignore[arg-type]
        for row, length in enumerate(case.lengths):
            for head in range(case.shape.kv_heads):
                expected = by_definition(case, row, head)
                assert table[row, head, : len(expected)].tolist() == expected
                assert int(lengths[row]) == length - (-(-length // BLOCK) - len(expected)) * BLOCK


def one_channel(long: bool, device: torch.device) -> Case:
    """Bounds that are exact: twice the maximum of the first channel."""
    case = Case("plain", "fp32", device, long=long)
    case.qkv.fill_(0)
    case.qkv[..., : case.shape.heads * case.shape.size : case.shape.size] = 1
    case.positions.fill_(0)  # nothing turns
    return case


@pytest.mark.parametrize("long", [False, True])
@pytest.mark.parametrize("kinds", [2, 8, 1000])
def test_bounds_that_differ_in_their_last_bits(kinds: int, long: bool, device: torch.device) -> None:
    case = one_channel(long, device)
    for sign in (1, -1):
        steps = torch.randint(0, kinds, case.summaries[:, :, :1].shape, device=device)
        case.summaries = sign * (1 + steps * 2.0**-23).repeat(1, 1, 2, 1)
        check(case)


@pytest.mark.parametrize("long", [False, True])
@pytest.mark.parametrize("bound", [0.0, -1.0, 3.5])
def test_of_equal_bounds_the_first_stay(bound: float, long: bool, device: torch.device) -> None:
    """All bounds alike; and then one of two values, of which all of the greater and some of the lesser stay."""
    case = one_channel(long, device)
    case.summaries.fill_(bound)
    check(case)
    few = case.paged.table[:, 40:42].flatten() if long else case.paged.table[:, 10]
    case.summaries[few[few < len(case.summaries)].long()] += 1
    check(case)


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
