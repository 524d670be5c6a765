"""The attention kernels against their twins: odd shapes, every kind of cache, poison wherever nobody may look."""

import pytest
import torch

from autoglm.kernels.gpu import decode_attention as decode_module
from autoglm.kernels.gpu.decode_attention import decode_attention
from autoglm.kernels.gpu.prefill_attention import prefill_attention
from autoglm.kernels.gpu.rotary import store_keys
from autoglm.kernels.reference import attention as twin
from tests.kernels.attention_cases import STORED, Heads, Paged, assert_same_cache, make_qkv, make_rotary

TOLERANCE = {"fp32": 2e-5, "bf16": 2e-2, "int8": 3e-2, "fp8": 3e-2}
# 9B: 32 query heads on 2 KV heads; here with fewer rotated pairs, no grouping, one KV head, all heads of a tile.
SHAPES = {
    "plain": Heads(),
    "one-kv-head": Heads(heads=6, kv_heads=1, size=16, section=(1, 1, 2)),
    "no-grouping": Heads(heads=4, kv_heads=4, size=64, section=(8, 12, 12)),
    "9b": Heads(heads=32, kv_heads=2, size=128, section=(8, 12, 12)),
}
LENGTHS = {  # block sizes are 4 and 16: sequences end on a border, just before, just behind; 0 is a row that pads
    "short": [1, 4, 5, 0, 2],
    "borders": [16, 64, 65, 66, 128, 129],
    "one": [200],
    "seventeen": [(7 * i) % 40 for i in range(17)],
}


def dtype_of(stored: str) -> torch.dtype:
    return torch.float32 if stored == "fp32" else torch.bfloat16


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize(
    ("name", "lengths", "block_size", "splits"),
    [
        ("plain", "short", 4, 1),
        ("plain", "seventeen", 16, 3),
        ("one-kv-head", "borders", 16, 2),
        ("no-grouping", "borders", 4, 1),
        ("9b", "one", 16, 2),
    ],
)
def test_decode_twin(name: str, lengths: str, block_size: int, splits: int, stored: str, device: torch.device) -> None:
    shape, ends = SHAPES[name], LENGTHS[lengths]
    before = Paged.make(shape, ends, block_size, stored, device, written=[max(0, end - 1) for end in ends])
    check_decode(shape, before, ends, splits, stored, device)


@pytest.mark.parametrize("most", [1, 2, 3, 32])
def test_any_number_of_splits(most: int, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shares of more than one tile, a last share that is not full, and sequences with nothing to share."""
    monkeypatch.setattr(decode_module, "MOST_SPLITS", most)
    monkeypatch.setattr(decode_module, "processors", lambda device: 1000)
    ends = [1, 65, 290, 0, 321]
    before = Paged.make(SHAPES["plain"], ends, 16, "fp32", device, written=[max(0, end - 1) for end in ends])
    check_decode(SHAPES["plain"], before, ends, 1, "fp32", device)


def check_decode(shape: Heads, before: Paged, ends: list[int], splits: int, stored: str, device: torch.device) -> None:
    dtype, rows = dtype_of(stored), len(ends)
    qkv, rotary = make_qkv(shape, rows + 2, splits, dtype, device), make_rotary(shape, device)
    qkv[:, rows:] = float("nan")  # the pass goes on behind its single tokens
    qkv[:, [end == 0 for end in ends] + [False] * 2] = float("nan")
    positions = torch.randint(0, 64, (3, rows + 2), dtype=torch.int32, device=device)
    ours, twins = before.copy(), before.copy()
    rest = (shape.heads, dtype)
    args = qkv[:, :rows], positions[:, :rows], rotary
    mixed = decode_attention(*args, ours.cache, ours.table, ours.lengths, *rest)
    table = twins.table.where(twins.table < 2**30, 0)
    expected = twin.decode_attention(*args, twins.cache, table, twins.lengths, *rest)
    assert mixed.dtype == dtype
    torch.testing.assert_close(mixed, expected, rtol=TOLERANCE[stored], atol=TOLERANCE[stored])
    assert (mixed[[end == 0 for end in ends]] == 0).all()
    written = torch.cat([before.slots(row, end - 1, end) for row, end in enumerate(ends) if end])
    assert_same_cache(ours.cache, twins.cache, before.cache, written)
    assert (decode_module.counters(device) == 0).all()


@pytest.mark.parametrize("group", [1, 2, 3, 7, 16, 17])
def test_any_group(group: int, device: torch.device) -> None:
    shape = Heads(heads=2 * group, kv_heads=2, size=16, section=(2, 1, 1))
    ends = [70, 3]
    before = Paged.make(shape, ends, 16, "fp32", device, written=[end - 1 for end in ends])
    check_decode(shape, before, ends, 1, "fp32", device)
    paged = Paged.make(shape, ends, 16, "fp32", device, written=ends)
    check_prefill(shape, paged, [40, 3], "fp32", device)


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize(
    ("name", "chunks", "lengths", "block_size"),
    [
        ("plain", [1, 17, 64], [1, 17, 64], 4),  # whole prompts
        ("plain", [16, 2, 130], [64, 201, 131], 16),  # chunks behind earlier keys
        ("one-kv-head", [5, 128], [128, 129], 16),
        ("no-grouping", [33, 129], [65, 129], 4),
        ("9b", [17], [80], 16),
    ],
)
def test_prefill_twin(
    name: str, chunks: list[int], lengths: list[int], block_size: int, stored: str, device: torch.device
) -> None:
    paged = Paged.make(SHAPES[name], lengths, block_size, stored, device, written=lengths)
    check_prefill(SHAPES[name], paged, chunks, stored, device)


def test_prefill_of_blocks_of_any_size(device: torch.device) -> None:
    paged = Paged.make(SHAPES["plain"], [37, 12], 6, "fp32", device, written=[37, 12])
    check_prefill(SHAPES["plain"], paged, [37, 5], "fp32", device)


def check_prefill(shape: Heads, paged: Paged, chunks: list[int], stored: str, device: torch.device) -> None:
    starts = torch.tensor([0, *chunks], device=device).cumsum(0).to(torch.int32)
    q = torch.randn(sum(chunks), shape.heads + 1, shape.size, device=device).to(dtype_of(stored))
    q[:, -1] = float("nan")  # what lies between the rows
    args = q[:, :-1], paged.cache, paged.table, starts, paged.lengths, max(chunks) + 3
    mixed, expected = prefill_attention(*args), twin.prefill_attention(*args)
    assert mixed.dtype == q.dtype
    torch.testing.assert_close(mixed, expected, rtol=TOLERANCE[stored], atol=TOLERANCE[stored])


@pytest.mark.parametrize("stored", STORED)
def test_decoding_goes_on_where_prefill_ended(stored: str, device: torch.device) -> None:
    """The last token of a prompt sees the same, whether it comes as part of a chunk or as a single token."""
    shape, tokens = SHAPES["plain"], 19
    paged = Paged.make(shape, [tokens], 4, stored, device, written=[0])
    rotary, dtype = make_rotary(shape, device), dtype_of(stored)
    qkv = make_qkv(shape, tokens, 1, dtype, device)
    positions = torch.arange(tokens, dtype=torch.int32, device=device).expand(3, -1).contiguous()
    slots = paged.slots(0, 0, tokens)
    other = paged.copy()
    q, _, _ = store_keys(qkv, positions, rotary, paged.cache, slots, shape.heads, dtype)
    starts = torch.tensor([0, tokens], dtype=torch.int32, device=device)
    chunk = prefill_attention(q, paged.cache, paged.table, starts, paged.lengths, tokens)
    for end in range(1, tokens + 1):
        row = slice(end - 1, end)
        lengths = torch.tensor([end], dtype=torch.int32, device=device)
        single = decode_attention(
            qkv[:, row], positions[:, row], rotary, other.cache, other.table, lengths, shape.heads, dtype
        )
        torch.testing.assert_close(single, chunk[row], rtol=TOLERANCE[stored], atol=TOLERANCE[stored])
    assert_same_cache(other.cache, paged.cache, paged.cache, slots)
