"""Rotating and storing keys, against the twin and against the definition."""

import pytest
import torch

from autoglm.kernels.gpu.rotary import store_keys
from autoglm.kernels.reference import attention as twin
from tests.kernels.attention_cases import (
    STORED,
    Heads,
    assert_same_cache,
    copy_cache,
    dequantized,
    make_cache,
    make_qkv,
    make_rotary,
)

SHAPES = {
    "plain": Heads(),
    "half-rotated": Heads(heads=6, kv_heads=1, size=16, section=(1, 1, 2)),
    "no-grouping": Heads(heads=4, kv_heads=4, size=64, section=(8, 12, 12)),
    "9b": Heads(heads=32, kv_heads=2, size=128, section=(8, 12, 12)),
}


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize(
    ("name", "rows", "splits"), [("plain", 17, 1), ("half-rotated", 5, 3), ("no-grouping", 1, 2), ("9b", 2, 1)]
)
def test_twin(name: str, rows: int, splits: int, stored: str, device: torch.device) -> None:
    torch.manual_seed(0)
    shape = SHAPES[name]
    dtype = torch.float32 if stored == "fp32" else torch.bfloat16
    qkv = make_qkv(shape, rows, splits, dtype, device)
    rotary = make_rotary(shape, device)
    positions = torch.randint(0, 64, (3, rows + 2), dtype=torch.int32, device=device)[:, 1:-1]
    before = make_cache(shape, 40, 4, stored, device)
    slots = torch.randperm(40, device=device)[:rows]
    slots[rows // 2 + 1 :: 3] = -1
    ours, twins = copy_cache(before), copy_cache(before)
    expected = twin.store_keys(qkv, positions, rotary, twins, slots, shape.heads, dtype)
    for x, y in zip(store_keys(qkv, positions, rotary, ours, slots, shape.heads, dtype), expected, strict=True):
        assert x.dtype == dtype
        torch.testing.assert_close(x, y, rtol=2**-7 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)
    assert_same_cache(ours, twins, before, slots[slots >= 0])


@pytest.mark.parametrize(("stored", "error"), [("fp32", 1e-6), ("int8", 0.5 / 127), ("fp8", 2**-4)])
def test_what_is_stored_is_the_value(stored: str, error: float, device: torch.device) -> None:
    """Within half a step of the row's (INT8) or the value's (FP8) magnitude; zeros stay zeros."""
    torch.manual_seed(0)
    shape = SHAPES["plain"]
    qkv = make_qkv(shape, 8, 1, torch.float32, device)
    qkv[:, 3] = 0
    cache = make_cache(shape, 8, 4, stored, device)
    positions = torch.arange(8, dtype=torch.int32, device=device).expand(3, -1).contiguous()
    slots = torch.arange(8, device=device)
    _, k, v = store_keys(qkv, positions, make_rotary(shape, device), cache, slots, shape.heads, torch.float32)
    for x, values, scales in ((k, cache.keys, cache.key_scales), (v, cache.values, cache.value_scales)):
        got = dequantized(values, scales)
        size = x.abs().amax(-1, keepdim=True) if stored == "int8" else x.abs()
        assert ((got - x).abs() <= size * error * 1.01 + 1e-3 * (stored == "fp8")).all()
        assert (got[3] == 0).all()


def test_fp8_saturates(device: torch.device) -> None:
    shape = SHAPES["plain"]
    qkv = make_qkv(shape, 2, 1, torch.float32, device).sign() * 1e4
    cache = make_cache(shape, 2, 4, "fp8", device)
    positions = torch.zeros(3, 2, dtype=torch.int32, device=device)
    slots = torch.arange(2, device=device)
    store_keys(qkv, positions, make_rotary(shape, device), cache, slots, shape.heads, torch.float32)
    assert (cache.keys.float().abs() == 448).all()
    assert (cache.values.float().abs() == 448).all()


def test_pairs_turn_by_the_position_on_their_axis(device: torch.device) -> None:
    shape = Heads(heads=1, kv_heads=1, size=16, section=(1, 2, 1))
    rotary = make_rotary(shape, device)
    positions = torch.tensor([[3], [7], [11]], dtype=torch.int32, device=device)
    qkv = torch.randn(1, 1, shape.width, device=device)
    cache = make_cache(shape, 1, 4, "fp32", device)
    slots = torch.zeros(1, dtype=torch.int64, device=device)
    q, _, _ = store_keys(qkv, positions, rotary, cache, slots, 1, torch.float32)
    x, y = qkv[0, 0, :16], q[0, 0]
    for pair, position in enumerate((3, 7, 7, 11)):
        cos, sin = rotary.table[:, position, pair]
        even, odd = x[2 * pair], x[2 * pair + 1]
        expected = torch.stack((even * cos - odd * sin, odd * cos + even * sin))
        torch.testing.assert_close(y[2 * pair : 2 * pair + 2], expected)
    torch.testing.assert_close(y[8:], x[8:], rtol=0, atol=0)
