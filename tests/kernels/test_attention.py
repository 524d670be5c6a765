"""The attention kernels against the reference: odd shapes, all cache dtypes, poison in memory that must not be read."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from autoglm.kernels.base import AttentionMetadata
from autoglm.kernels.gpu import decode_attention as decode_module
from autoglm.kernels.gpu.decode_attention import decode_attention
from autoglm.kernels.gpu.prefill_attention import prefill_attention
from autoglm.kernels.gpu.rotary import store_kv
from autoglm.kernels.reference import attention as reference
from tests.kernels.attention_cases import (
    CACHE_DTYPES,
    AttentionShape,
    PagedSequences,
    assert_same_cache,
    make_config,
    make_qkv,
    model_dtype,
)
from tests.kernels.device import DEVICE, set_num_sms

TOLERANCE = {"fp32": 2e-5, "bf16": 2e-2, "int8": 3e-2, "fp8": 3e-2}
# The 9B model has 32 query heads on 2 KV heads. The others: few rotated pairs, one KV head, no grouping.
SHAPES = {
    "plain": AttentionShape(),
    "one-kv-head": AttentionShape(num_heads=6, kv_heads=1, head_dim=16, sections=(1, 1, 2)),
    "no-grouping": AttentionShape(num_heads=4, kv_heads=4, head_dim=64, sections=(8, 12, 12)),
    "9b": AttentionShape(num_heads=32, kv_heads=2, head_dim=128, sections=(8, 12, 12)),
}
SEQ_LENS = {  # for blocks of 4 and 16: sequences end at, just before and just after a block's end; 0 is a padding row
    "short": [1, 4, 5, 0, 2],
    "borders": [16, 64, 65, 66, 128, 129],
    "one": [200],
    "seventeen": [(7 * i) % 40 for i in range(17)],
}


@pytest.mark.parametrize("stored", CACHE_DTYPES)
@pytest.mark.parametrize(
    ("name", "seq_lens", "block_size", "num_partials"),
    [
        ("plain", "short", 4, 1),
        ("plain", "seventeen", 16, 3),
        ("one-kv-head", "borders", 16, 2),
        ("no-grouping", "borders", 4, 1),
        ("9b", "one", 16, 2),
    ],
)
def test_decode_attention_equals_the_reference(
    name: str, seq_lens: str, block_size: int, num_partials: int, stored: str
) -> None:
    check_decode(SHAPES[name], SEQ_LENS[seq_lens], block_size, stored, num_partials)


@pytest.mark.parametrize("num_sms", [30, 1000])  # partial results are combined 4 or 16 at a time
@pytest.mark.parametrize("max_splits", [1, 2, 3, 32])
def test_keys_are_split_among_any_number_of_programs(
    max_splits: int, num_sms: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Splits of several tiles, a last split that is not full, and sequences too short to be split."""
    monkeypatch.setattr(decode_module, "MAX_SPLITS", max_splits)
    set_num_sms(monkeypatch, decode_module, num_sms)
    check_decode(SHAPES["plain"], [1, 65, 290, 0, 321, 1100], 16, "fp32")


def check_decode(
    shape: AttentionShape, seq_lens: list[int], block_size: int, stored: str, num_partials: int = 1
) -> None:
    before = PagedSequences.make(
        shape, seq_lens, block_size, stored, num_written=[max(0, seq_len - 1) for seq_len in seq_lens]
    )
    dtype, rows = model_dtype(stored), len(seq_lens)
    padding = [seq_len == 0 for seq_len in seq_lens]
    qkv = make_qkv(shape, rows + 2, num_partials, dtype)
    qkv[:, rows:] = float("nan")  # further rows of the pass
    qkv[:, padding + [False] * 2] = float("nan")
    positions = torch.randint(0, 64, (3, rows + 2), dtype=torch.int32, device=DEVICE)
    inputs: dict[str, Any] = {"qkv": qkv[:, :rows], "config": make_config(shape, dtype)}
    metadata = AttentionMetadata(positions[:, :rows], before.block_table, before.seq_lens)
    ours, theirs = before.copy().cache, before.copy().cache
    found = decode_attention(**inputs, cache=ours, metadata=metadata)
    metadata = replace(metadata, block_table=before.block_table.where(before.block_table < 2**30, 0))
    expected = reference.decode_attention(**inputs, cache=theirs, metadata=metadata)
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected, rtol=TOLERANCE[stored], atol=TOLERANCE[stored])
    assert (found[padding] == 0).all()
    written = torch.cat([before.slots(row, end - 1, end) for row, end in enumerate(seq_lens) if end])
    assert_same_cache(ours, theirs, before.cache, written)
    assert (decode_module.counters(DEVICE) == 0).all()


@pytest.mark.parametrize("group", [1, 2, 3, 7, 16, 17])
def test_any_number_of_query_heads_shares_a_kv_head(group: int) -> None:
    shape = AttentionShape(num_heads=2 * group, kv_heads=2, head_dim=16, sections=(2, 1, 1))
    check_decode(shape, [70, 3], 16, "fp32")
    check_prefill(shape, [70, 3], [40, 3], 16, "fp32")


@pytest.mark.parametrize("stored", CACHE_DTYPES)
@pytest.mark.parametrize(
    ("name", "chunks", "seq_lens", "block_size"),
    [
        ("plain", [1, 17, 64], [1, 17, 64], 4),  # whole prompts
        ("plain", [16, 2, 130], [64, 201, 131], 16),  # later chunks of prompts
        ("one-kv-head", [5, 128], [128, 129], 16),
        ("no-grouping", [33, 129], [65, 129], 4),
        ("9b", [17], [80], 16),
    ],
)
def test_prefill_attention_equals_the_reference(
    name: str, chunks: list[int], seq_lens: list[int], block_size: int, stored: str
) -> None:
    check_prefill(SHAPES[name], seq_lens, chunks, block_size, stored)


def test_prefill_attention_takes_any_block_size() -> None:
    check_prefill(SHAPES["plain"], [37, 12], [37, 5], 6, "fp32")


def check_prefill(shape: AttentionShape, seq_lens: list[int], chunks: list[int], block_size: int, stored: str) -> None:
    paged = PagedSequences.make(shape, seq_lens, block_size, stored, num_written=seq_lens)
    q = torch.randn(sum(chunks), shape.num_heads + 1, shape.head_dim, device=DEVICE).to(model_dtype(stored))
    q[:, -1] = float("nan")  # between the rows
    metadata = AttentionMetadata(
        positions=torch.empty(0),  # not read
        block_table=paged.block_table,
        seq_lens=paged.seq_lens,
        cu_seqlens_q=torch.tensor([0, *chunks], device=DEVICE).cumsum(0).to(torch.int32),
        max_seqlen_q=max(chunks) + 3,
    )
    inputs: dict[str, Any] = {"q": q[:, :-1], "cache": paged.cache, "metadata": metadata}
    found, expected = prefill_attention(**inputs), reference.prefill_attention(**inputs)
    assert found.dtype == q.dtype
    torch.testing.assert_close(found, expected, rtol=TOLERANCE[stored], atol=TOLERANCE[stored])


@pytest.mark.parametrize("stored", CACHE_DTYPES)
def test_decode_and_prefill_attention_agree(stored: str) -> None:
    """Each token of a prompt gets the same result in a chunk as when it is decoded."""
    shape, tokens = SHAPES["plain"], 11
    paged = PagedSequences.make(shape, [tokens], 4, stored, num_written=[0])
    dtype = model_dtype(stored)
    qkv = make_qkv(shape, tokens, 1, dtype)
    positions = torch.arange(tokens, dtype=torch.int32, device=DEVICE).expand(3, -1).contiguous()
    slots = paged.slots(0, 0, tokens)
    decoded = paged.copy()
    config = make_config(shape, dtype)
    q, _, _ = store_kv(qkv=qkv, positions=positions, slot_mapping=slots, cache=paged.cache, config=config)
    metadata = AttentionMetadata(
        positions,
        paged.block_table,
        paged.seq_lens,
        cu_seqlens_q=torch.tensor([0, tokens], dtype=torch.int32, device=DEVICE),
        max_seqlen_q=tokens,
    )
    chunk = prefill_attention(q=q, cache=paged.cache, metadata=metadata)
    for end in range(1, tokens + 1):
        row = slice(end - 1, end)
        seq_lens = torch.tensor([end], dtype=torch.int32, device=DEVICE)
        metadata = AttentionMetadata(positions[:, row], decoded.block_table, seq_lens)
        single = decode_attention(qkv=qkv[:, row], cache=decoded.cache, metadata=metadata, config=config)
        torch.testing.assert_close(single, chunk[row], rtol=TOLERANCE[stored], atol=TOLERANCE[stored])
    assert_same_cache(decoded.cache, paged.cache, paged.cache, slots)
