"""Rotating and storing keys and values, against the reference and the definition."""

from typing import Any

import pytest
import torch

from autoglm.kernels.gpu.rotary import store_kv
from autoglm.kernels.reference import attention as reference
from tests.kernels.attention_cases import (
    CACHE_DTYPES,
    AttentionShape,
    assert_same_cache,
    copy_cache,
    dequantized,
    make_cache,
    make_config,
    make_qkv,
    model_dtype,
)
from tests.kernels.device import DEVICE

PLAIN = AttentionShape()
SHAPES = {
    "plain": PLAIN,
    "half-rotated": AttentionShape(num_heads=6, kv_heads=1, head_dim=16, sections=(1, 1, 2)),
    "no-grouping": AttentionShape(num_heads=4, kv_heads=4, head_dim=64, sections=(8, 12, 12)),
    "9b": AttentionShape(num_heads=32, kv_heads=2, head_dim=128, sections=(8, 12, 12)),
}


@pytest.mark.parametrize("stored", CACHE_DTYPES)
@pytest.mark.parametrize(
    ("name", "rows", "num_partials"), [("plain", 17, 1), ("half-rotated", 5, 3), ("no-grouping", 1, 2), ("9b", 2, 1)]
)
def test_store_kv_equals_the_reference(name: str, rows: int, num_partials: int, stored: str) -> None:
    shape, dtype = SHAPES[name], model_dtype(stored)
    before = make_cache(shape, 40, 4, stored)
    slots = torch.randperm(40, device=DEVICE)[:rows]
    slots[rows // 2 + 1 :: 3] = -1
    inputs: dict[str, Any] = {
        "qkv": make_qkv(shape, rows, num_partials, dtype),
        "positions": torch.randint(0, 64, (3, rows + 2), dtype=torch.int32, device=DEVICE)[:, 1:-1],
        "slot_mapping": slots,
        "config": make_config(shape, dtype),
    }
    ours, theirs = copy_cache(before), copy_cache(before)
    expected = reference.store_kv(cache=theirs, **inputs)
    for x, y in zip(store_kv(cache=ours, **inputs), expected, strict=True):
        assert x.dtype == dtype
        torch.testing.assert_close(x, y, rtol=2**-7 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)
    assert_same_cache(ours, theirs, before, slots[slots >= 0])


@pytest.mark.parametrize(("stored", "error"), [("fp32", 1e-6), ("int8", 0.5 / 127), ("fp8", 2**-4)])
def test_stored_values_are_within_half_a_step(stored: str, error: float) -> None:
    """A step is relative to the largest magnitude of the row (INT8) or to the value (FP8). Zeros stay zeros."""
    qkv = make_qkv(PLAIN, 8, 1, torch.float32)
    qkv[:, 3] = 0
    cache = make_cache(PLAIN, 8, 4, stored)
    _, k, v = store_kv(
        qkv=qkv,
        positions=torch.arange(8, dtype=torch.int32, device=DEVICE).expand(3, -1).contiguous(),
        cache=cache,
        slot_mapping=torch.arange(8, device=DEVICE),
        config=make_config(PLAIN, torch.float32),
    )
    for x, values, scales in ((k, cache.keys, cache.key_scales), (v, cache.values, cache.value_scales)):
        found = dequantized(values, scales)
        size = x.abs().amax(-1, keepdim=True) if stored == "int8" else x.abs()
        assert ((found - x).abs() <= size * error * 1.01 + 1e-3 * (stored == "fp8")).all()
        assert (found[3] == 0).all()


def test_fp8_saturates() -> None:
    cache = make_cache(PLAIN, 2, 4, "fp8")
    store_kv(
        qkv=make_qkv(PLAIN, 2, 1, torch.float32).sign() * 1e4,
        positions=torch.zeros(3, 2, dtype=torch.int32, device=DEVICE),
        cache=cache,
        slot_mapping=torch.arange(2, device=DEVICE),
        config=make_config(PLAIN, torch.float32),
    )
    assert (cache.keys.float().abs() == 448).all()
    assert (cache.values.float().abs() == 448).all()


def test_pairs_are_rotated_by_the_position_on_their_axis() -> None:
    shape = AttentionShape(num_heads=1, kv_heads=1, head_dim=16, sections=(1, 2, 1))
    config = make_config(shape, torch.float32)
    qkv = torch.randn(1, 1, shape.width, device=DEVICE)
    q, _, _ = store_kv(
        qkv=qkv,
        positions=torch.tensor([[3], [7], [11]], dtype=torch.int32, device=DEVICE),
        cache=make_cache(shape, 1, 4, "fp32"),
        slot_mapping=torch.zeros(1, dtype=torch.int64, device=DEVICE),
        config=config,
    )
    x, y = qkv[0, 0, :16], q[0, 0]
    for pair, position in enumerate((3, 7, 7, 11)):
        cos, sin = config.rotary_table[:, position, pair]
        even, odd = x[2 * pair], x[2 * pair + 1]
        expected = torch.stack((even * cos - odd * sin, odd * cos + even * sin))
        torch.testing.assert_close(y[2 * pair : 2 * pair + 2], expected)
    torch.testing.assert_close(y[8:], x[8:], rtol=0, atol=0)
