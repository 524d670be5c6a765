"""Decode attention over the paged cache: one launch a layer.

Flash decoding (Dao et al. 2023, "Flash-Decoding for long-context inference"): a sequence's keys are split among several
programs, and the last one to finish combines their results. The query heads that share a KV head are the rows of a
tile.
"""

from functools import cache as once

import torch
import triton
import triton.language as tl

from autoglm.device import device_info
from autoglm.kernels.base import AttentionConfig, AttentionMetadata, LayerCache
from autoglm.kernels.gpu.pdl import PDL, pdl_launch, pdl_wait
from autoglm.kernels.gpu.rotary import angles, encode, rotate, scale_arguments, sum_heads

MAX_SPLITS = 32  # beyond this, combining costs more than splitting saves
MAX_PAIRS = 1 << 16  # (sequence, KV head) pairs of a launch


@triton.jit
def find_slots(block_table, first, end, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Cache slots [BLOCK_N] of the keys from `first`; arbitrary from `end`."""
    indices = first + tl.arange(0, BLOCK_N)
    block = tl.load(block_table + indices // BLOCK_SIZE, mask=indices < end, other=0).to(tl.int64)
    return block * BLOCK_SIZE + indices % BLOCK_SIZE


@triton.jit
def load_tile(
    data, scales, slots, first, end, head, scale_stride, KV_HEADS: tl.constexpr, D: tl.constexpr, SCALED: tl.constexpr
):
    """Keys or values of one head as stored [BLOCK_N, D], and their scales [BLOCK_N]; 0 from `end`."""
    inside = first + tl.arange(0, slots.shape[0]) < end
    at = (slots * KV_HEADS + head)[:, None] * D + tl.arange(0, D)[None, :]
    tile = tl.load(data + at, mask=inside[:, None], other=0.0)
    scale = tl.zeros(slots.shape, tl.float32)
    if SCALED:
        scale = tl.load(scales + slots * scale_stride + head, mask=inside, other=0.0)
    return tile, scale


@triton.jit
def attend(q, k, k_scale, v, v_scale, inside, acc, max_score, total, softmax_scale, SCALED: tl.constexpr):
    """Accumulate one tile of keys and values: weighted sum [R, D], highest score [R] and sum of weights [R]."""
    scores = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision="ieee") * softmax_scale
    if SCALED:
        scores *= k_scale[None, :]
    scores = tl.where(inside[None, :], scores, float("-inf"))
    new_max = tl.maximum(max_score, tl.max(scores, 1))
    shrink = tl.exp2(max_score - new_max)
    weights = tl.exp2(scores - new_max[:, None])
    total = total * shrink + tl.sum(weights, 1)
    if SCALED:
        weights *= v_scale[None, :]
    acc = tl.dot(weights.to(q.dtype), v.to(q.dtype), acc * shrink[:, None], input_precision="ieee")
    return acc, new_max, total


@triton.jit(
    do_not_specialize=["axis_stride", "splits"], do_not_specialize_on_alignment=["positions", "block_table", "seq_lens"]
)
def _decode_attention(
    qkv, positions, table, keys, values, key_scales, value_scales, block_table, seq_lens, out, partials, sums, counters,
    split_stride, row_stride, axis_stride, table_rows, scale_stride, block_table_stride, head_stride, splits,
    softmax_scale,
    S: tl.constexpr, GROUP: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr,
    FIRST: tl.constexpr, SECOND: tl.constexpr, BLOCK_SIZE: tl.constexpr, SCALED: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, TOGETHER: tl.constexpr, SELECTED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (split, KV head, sequence). SELECTED: block table and seq_lens are written by the previous kernel."""
    pdl_launch(PDL)
    split = tl.program_id(0)
    head = tl.program_id(1)
    sequence = tl.program_id(2).to(tl.int64)
    dtype: tl.constexpr = out.dtype.element_ty
    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, D)
    used = (rows < GROUP)[:, None]
    out += (sequence * KV_HEADS + head) * GROUP * D
    out_at = out + rows[:, None] * D + columns[None, :]

    if SELECTED:
        cos, sin = angles(table, positions + sequence, axis_stride, table_rows, HALF, FIRST, SECOND, D)
        pdl_wait(PDL)
    seq_len = tl.load(seq_lens + sequence)
    old = tl.maximum(seq_len - 1, 0)  # keys of earlier passes
    tiles = tl.cdiv(old, BLOCK_N)
    share = tl.maximum(tl.cdiv(tiles, splits), 1)
    working = tl.maximum(tl.cdiv(tiles, share), 1)
    first = split * share * BLOCK_N
    end = tl.minimum(first + share * BLOCK_N, old)
    if split >= working:  # exits at once, which makes room for the next kernel
        return
    block_table += sequence * block_table_stride + head * head_stride
    # Written before this pass, so loading starts before waiting: the first tile, and the slots of the second.
    slots = find_slots(block_table, first, end, BLOCK_SIZE, BLOCK_N)
    k, k_scale = load_tile(keys, key_scales, slots, first, end, head, scale_stride, KV_HEADS, D, SCALED)
    v, v_scale = load_tile(values, value_scales, slots, first, end, head, scale_stride, KV_HEADS, D, SCALED)
    slots = find_slots(block_table, first + BLOCK_N, end, BLOCK_SIZE, BLOCK_N)
    if not SELECTED:
        cos, sin = angles(table, positions + sequence, axis_stride, table_rows, HALF, FIRST, SECOND, D)
        pdl_wait(PDL)
    if seq_len == 0:
        tl.store(out_at, tl.zeros((ROWS, D), dtype), mask=used)
        return

    qkv += sequence * row_stride
    q = rotate(sum_heads(qkv, head * GROUP, GROUP, split_stride, S, ROWS, D), cos, sin, ROWS, D).to(dtype)
    own_k = rotate(sum_heads(qkv, KV_HEADS * GROUP + head, 1, split_stride, S, 1, D), cos, sin, 1, D)
    own_v = sum_heads(qkv, KV_HEADS * GROUP + KV_HEADS + head, 1, split_stride, S, 1, D)

    max_score = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, D), tl.float32)
    for start in range(first, end, BLOCK_N):
        tile_k, tile_k_scale, tile_v, tile_v_scale = k, k_scale, v, v_scale
        next = start + BLOCK_N
        k, k_scale = load_tile(keys, key_scales, slots, next, end, head, scale_stride, KV_HEADS, D, SCALED)
        v, v_scale = load_tile(values, value_scales, slots, next, end, head, scale_stride, KV_HEADS, D, SCALED)
        slots = find_slots(block_table, next + BLOCK_N, end, BLOCK_SIZE, BLOCK_N)
        inside = start + tl.arange(0, BLOCK_N) < end
        acc, max_score, total = attend(
            q, tile_k, tile_k_scale, tile_v, tile_v_scale, inside, acc, max_score, total, softmax_scale, SCALED
        )

    if split == working - 1:
        # The new token's own key and value: from registers, rounded as the cache stores them.
        slot = tl.load(block_table + old // BLOCK_SIZE).to(tl.int64) * BLOCK_SIZE + old % BLOCK_SIZE
        at = (slot * KV_HEADS + head) * D + columns[None, :]
        scale_at = slot * scale_stride + head + tl.arange(0, 1)
        stored_k, own_k_scale = encode(own_k, key_scales + scale_at, scale_at >= 0, keys.dtype.element_ty)
        stored_v, own_v_scale = encode(own_v, value_scales + scale_at, scale_at >= 0, values.dtype.element_ty)
        tl.store(keys + at, stored_k)
        tl.store(values + at, stored_v)
        own_k = stored_k.to(tl.float32) * own_k_scale[:, None]
        own_v = stored_v.to(tl.float32) * own_v_scale[:, None]
        score = tl.sum(q.to(tl.float32) * own_k, 1) * softmax_scale
        new_max = tl.maximum(max_score, score)
        shrink = tl.exp2(max_score - new_max)
        weight = tl.exp2(score - new_max)
        total = total * shrink + weight
        acc = acc * shrink[:, None] + weight[:, None] * own_v
        max_score = new_max

    acc *= (1.0 / total)[:, None]
    if working == 1:
        tl.store(out_at, acc.to(dtype), mask=used)
        return
    pair = sequence * KV_HEADS + head
    partials += pair * splits * ROWS * D
    sums += pair * splits * ROWS
    inside = rows[:, None] * D + columns[None, :]
    tl.store(partials + split * ROWS * D + inside, acc)
    tl.store(sums + split * ROWS + rows, max_score + tl.log2(total))
    tl.debug_barrier()  # all threads have written before one increments the counter
    if tl.atomic_add(counters + pair, 1, sem="acq_rel") < working - 1:
        return
    tl.store(counters + pair, 0)

    max_score = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, D), tl.float32)
    for start in range(0, working, TOGETHER):
        split_ids = start + tl.arange(0, TOGETHER)
        valid = (split_ids < working)[None, :]
        at = split_ids[None, :] * ROWS + rows[:, None]
        part_sums = tl.load(sums + at, mask=valid, other=float("-inf"), cache_modifier=".cg")
        at = split_ids[None, :, None] * (ROWS * D) + inside[:, None, :]
        parts = tl.load(partials + at, mask=valid[:, :, None], other=0.0, cache_modifier=".cg")
        new_max = tl.maximum(max_score, tl.max(part_sums, 1))
        shrink = tl.exp2(max_score - new_max)
        weights = tl.exp2(part_sums - new_max[:, None])
        total = total * shrink + tl.sum(weights, 1)
        acc = acc * shrink[:, None] + tl.sum(parts * weights[:, :, None], 1)
        max_score = new_max
    tl.store(out_at, (acc * (1.0 / total)[:, None]).to(dtype), mask=used)


def decode_attention(
    *, qkv: torch.Tensor, cache: LayerCache, metadata: AttentionMetadata, config: AttentionConfig
) -> torch.Tensor:
    """See `Kernels.decode_attention`. head_dim is a power of two.

    Does not block, and launches depend on shapes only, so it can be captured in a graph. Only one stream of a device
    may use it at a time: the programs of a launch synchronise through counters of the device. Positions, block table,
    seq_lens and keys of earlier passes are read before the previous kernel has completed, so a launch without PDL must
    follow the kernels that wrote them. A table of selected blocks and its seq_lens are read after waiting: the previous
    kernel may have written them.
    """
    positions, block_table, table = metadata.positions, metadata.block_table, config.rotary_table
    parts, batch, _ = qkv.shape
    kv_heads, size = cache.keys.shape[1:]
    if batch * kv_heads > MAX_PAIRS:
        raise ValueError(f"sequences * kv_heads must be at most {MAX_PAIRS} in a pass (got {batch} * {kv_heads})")
    num_sms = device_info(qkv.device).num_sms
    splits = min(MAX_SPLITS, max(1, 2 * num_sms // (batch * kv_heads)))
    few = batch * kv_heads * splits <= num_sms  # one program per SM: more warps hide more latency
    block_n = 32 if cache.key_scales is not None and not few else 64  # unpacking 8-bit tiles takes more registers
    group = config.num_heads // kv_heads
    rows = max(16, triton.next_power_of_2(group))
    out = qkv.new_empty(batch, config.num_heads * size, dtype=config.dtype)
    partials = qkv.new_empty(batch * kv_heads * splits * rows * size, dtype=torch.float32)
    sums = qkv.new_empty(batch * kv_heads * splits * rows, dtype=torch.float32)
    key_scales, value_scales, scale_stride = scale_arguments(cache)
    first, second, _ = config.mrope_section
    selected = block_table.dim() == 3
    _decode_attention[(splits, kv_heads, batch)](
        qkv, positions, table, cache.keys, cache.values, key_scales, value_scales, block_table, metadata.seq_lens,
        out, partials, sums, counters(qkv.device),
        qkv.stride(0), qkv.stride(1), positions.stride(0), table.shape[1], scale_stride, block_table.stride(0),
        block_table.stride(1) if selected else 0, splits,
        size**-0.5 * 1.4426950408889634,  # log2(e): the softmax is taken in base 2
        S=parts, GROUP=group, KV_HEADS=kv_heads, D=size, HALF=table.shape[2], FIRST=first, SECOND=first + second,
        BLOCK_SIZE=cache.block_size, SCALED=cache.key_scales is not None,
        ROWS=rows, BLOCK_N=block_n, TOGETHER=16 if few else 4, SELECTED=selected,
        PDL=PDL, launch_pdl=PDL, num_warps=8 if few else 4,
    )  # fmt: skip
    return out


@once
def counters(device: torch.device) -> torch.Tensor:
    """int32 [MAX_PAIRS], zero between launches. Allocated by the first call, which must not be in a graph capture."""
    return torch.zeros(MAX_PAIRS, dtype=torch.int32, device=device)
