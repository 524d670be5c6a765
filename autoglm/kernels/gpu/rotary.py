"""Rotary embedding of q and k, and storing k and v in the cache; device functions that the attention kernels share."""

import torch
import triton
import triton.language as tl

from autoglm.kernels.base import AttentionConfig, LayerCache
from autoglm.kernels.gpu.pdl import PDL, pdl_launch, pdl_wait

FP8_LIMIT = tl.constexpr(448.0)  # the largest float8_e4m3fn


@triton.jit
def angles(
    table, positions, axis_stride, table_rows,
    HALF: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Cosines and sines [D / 2] of one token; dimensions that are not rotated get 1 and 0.

    `positions` points to the token's position on the first axis; the pairs of the second and third axis begin at FIRST
    and SECOND.
    """
    pair = tl.arange(0, D // 2)
    turns = pair < HALF
    axis = (pair >= FIRST).to(tl.int32) + (pair >= SECOND).to(tl.int32)
    position = tl.load(positions + axis * axis_stride, mask=turns, other=0)
    cos = tl.load(table + position * HALF + pair, mask=turns, other=1.0)
    sin = tl.load(table + (table_rows + position) * HALF + pair, mask=turns, other=0.0)
    return cos, sin


@triton.jit
def sum_heads(qkv, first, heads, split_stride, S: tl.constexpr, R: tl.constexpr, D: tl.constexpr):
    """The sum over the S partials of `heads` heads of one token from head `first`: fp32 [R, D], R >= heads."""
    rows = tl.arange(0, R)[:, None]
    at = qkv + (first + rows) * D + tl.arange(0, D)[None, :]
    x = tl.load(at, mask=rows < heads, other=0.0).to(tl.float32)
    for s in tl.static_range(1, S):
        x += tl.load(at + s * split_stride, mask=rows < heads, other=0.0).to(tl.float32)
    return x


@triton.jit
def rotate(x, cos, sin, R: tl.constexpr, D: tl.constexpr):
    """Rotate adjacent pairs of x [R, D]; cos and sin [D / 2]."""
    even, odd = tl.split(tl.reshape(x, (R, D // 2, 2)))
    cos = cos[None, :]
    sin = sin[None, :]
    return tl.reshape(tl.join(even * cos - odd * sin, odd * cos + even * sin), (R, D))


@triton.jit
def encode(x, scales, mask, dtype: tl.constexpr):
    """x fp32 [R, D] in the cache's `dtype`, and the scale of each row, fp32 [R].

    `scales` points to each row's scale: read for FP8, written for INT8.
    """
    if dtype == tl.int8:
        largest = tl.maximum(tl.max(tl.abs(x), 1), 1e-30)
        scale = largest / 127.0
        tl.store(scales, scale, mask=mask)
        # Adding 1.5 * 2^23 leaves the nearest integer (ties to even) in the low bits of the mantissa.
        stored = (x * (127.0 / largest)[:, None] + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)
    elif dtype == tl.float8e4nv:
        scale = tl.load(scales, mask=mask, other=1.0)
        stored = tl.minimum(tl.maximum(x / scale[:, None], -FP8_LIMIT), FP8_LIMIT).to(tl.float8e4nv)
    else:
        scale = tl.full((x.shape[0],), 1.0, tl.float32)
        stored = x.to(dtype)
    return stored, scale


@triton.jit(do_not_specialize=["axis_stride"], do_not_specialize_on_alignment=["positions", "slot_mapping"])
def _store_kv(
    qkv, positions, table, slot_mapping, out, keys, values, key_scales, value_scales,
    split_stride, row_stride, axis_stride, table_rows, scale_stride,
    S: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr,
    FIRST: tl.constexpr, SECOND: tl.constexpr, Q_ROWS: tl.constexpr, KV_ROWS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program a token."""
    pdl_launch(PDL)
    pdl_wait(PDL)
    token = tl.program_id(0).to(tl.int64)
    qkv += token * row_stride
    out += token * (HEADS + 2 * KV_HEADS) * D
    cos, sin = angles(table, positions + token, axis_stride, table_rows, HALF, FIRST, SECOND, D)
    columns = tl.arange(0, D)[None, :]

    q_rows = tl.arange(0, Q_ROWS)[:, None]
    q = rotate(sum_heads(qkv, 0, HEADS, split_stride, S, Q_ROWS, D), cos, sin, Q_ROWS, D)
    tl.store(out + q_rows * D + columns, q.to(out.dtype.element_ty), mask=q_rows < HEADS)

    heads = tl.arange(0, KV_ROWS)
    rows = heads[:, None]
    k = rotate(sum_heads(qkv, HEADS, KV_HEADS, split_stride, S, KV_ROWS, D), cos, sin, KV_ROWS, D)
    v = sum_heads(qkv, HEADS + KV_HEADS, KV_HEADS, split_stride, S, KV_ROWS, D)

    tl.store(out + (HEADS + rows) * D + columns, k.to(out.dtype.element_ty), mask=rows < KV_HEADS)
    tl.store(out + (HEADS + KV_HEADS + rows) * D + columns, v.to(out.dtype.element_ty), mask=rows < KV_HEADS)
    slot = tl.load(slot_mapping + token)
    real = heads < tl.where(slot >= 0, KV_HEADS, 0)
    at = slot * KV_HEADS * D + rows * D + columns
    scale_at = slot * scale_stride + heads
    stored, _ = encode(k, key_scales + scale_at, real, keys.dtype.element_ty)
    tl.store(keys + at, stored, mask=real[:, None])
    stored, _ = encode(v, value_scales + scale_at, real, values.dtype.element_ty)
    tl.store(values + at, stored, mask=real[:, None])


def store_kv(
    *,
    qkv: torch.Tensor,
    positions: torch.Tensor,
    slot_mapping: torch.Tensor,
    cache: LayerCache,
    config: AttentionConfig,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `Kernels.store_kv`; q, k and v are views of one tensor. head_dim is a power of two."""
    splits, tokens, _ = qkv.shape
    num_heads, table = config.num_heads, config.rotary_table
    kv_heads, size = cache.keys.shape[1:]
    out = qkv.new_empty(tokens, num_heads + 2 * kv_heads, size, dtype=config.dtype)
    key_scales, value_scales, scale_stride = scale_arguments(cache)
    first, second, _ = config.mrope_section
    _store_kv[(tokens,)](
        qkv, positions, table, slot_mapping, out, cache.keys, cache.values, key_scales, value_scales,
        qkv.stride(0), qkv.stride(1), positions.stride(0), table.shape[1], scale_stride,
        S=splits, HEADS=num_heads, KV_HEADS=kv_heads, D=size,
        HALF=table.shape[2], FIRST=first, SECOND=first + second,
        Q_ROWS=triton.next_power_of_2(num_heads), KV_ROWS=triton.next_power_of_2(kv_heads),
        PDL=PDL, launch_pdl=PDL, num_warps=4,
    )  # fmt: skip
    q, k, v = torch.split(out, [num_heads, kv_heads, kv_heads], dim=1)
    return q, k, v


def scale_arguments(cache: LayerCache) -> tuple[torch.Tensor, torch.Tensor, int]:
    """The scales of keys and values and their stride along the tokens; unused dummies for a cache without scales."""
    if cache.key_scales is None or cache.value_scales is None:
        return cache.keys, cache.values, 0
    return cache.key_scales, cache.value_scales, cache.key_scales.stride(0)
