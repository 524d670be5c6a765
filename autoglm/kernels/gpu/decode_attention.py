"""Attention of decoding sequences over the paged cache: one launch a layer, on a GPU.

Flash decoding (Dao et al. 2023, "Flash-Decoding for long-context inference"): a sequence's keys are shared out over
several programs, whose results are put together by the one that comes last. The query heads that share a KV head are
the rows of one tile.
"""

from functools import cache as once

import torch
import triton
import triton.language as tl

from autoglm.kernels.base import LayerCache, Rotary
from autoglm.kernels.gpu.pdl import PDL, pdl_launch, pdl_wait
from autoglm.kernels.gpu.rotary import angles, encode, rotate, scale_arguments, sum_heads

MOST_SPLITS = 32  # more shares make the last program read longer than the others save
MOST_PAIRS = 1 << 16  # of a sequence and a KV head in one launch


@triton.jit
def find_slots(block_table, first, end, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Slots [BLOCK_N] of the keys `first`, ...; anything from `end` on."""
    places = first + tl.arange(0, BLOCK_N)
    block = tl.load(block_table + places // BLOCK_SIZE, mask=places < end, other=0).to(tl.int64)
    return block * BLOCK_SIZE + places % BLOCK_SIZE


@triton.jit
def load_tile(
    data, scales, slots, first, end, head, scale_stride, KV_HEADS: tl.constexpr, D: tl.constexpr, SCALED: tl.constexpr
):
    """Keys or values of one head as stored [BLOCK_N, D], and their scales [BLOCK_N]; 0 from `end` on."""
    inside = first + tl.arange(0, slots.shape[0]) < end
    at = (slots * KV_HEADS + head)[:, None] * D + tl.arange(0, D)[None, :]
    tile = tl.load(data + at, mask=inside[:, None], other=0.0)
    scale = tl.zeros(slots.shape, tl.float32)
    if SCALED:
        scale = tl.load(scales + slots * scale_stride + head, mask=inside, other=0.0)
    return tile, scale


@triton.jit
def attend(q, k, k_scale, v, v_scale, inside, mixed, top, total, softmax_scale, SCALED: tl.constexpr):
    """Take one tile of keys and values in: the running mixture [R, D], highest score [R] and sum of weights [R]."""
    scores = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision="ieee") * softmax_scale
    if SCALED:
        scores *= k_scale[None, :]
    scores = tl.where(inside[None, :], scores, float("-inf"))
    higher = tl.maximum(top, tl.max(scores, 1))
    shrink = tl.exp2(top - higher)
    weights = tl.exp2(scores - higher[:, None])
    total = total * shrink + tl.sum(weights, 1)
    if SCALED:
        weights *= v_scale[None, :]
    mixed = tl.dot(weights.to(q.dtype), v.to(q.dtype), mixed * shrink[:, None], input_precision="ieee")
    return mixed, higher, total


@triton.jit(
    do_not_specialize=["axis_stride", "splits"], do_not_specialize_on_alignment=["positions", "block_table", "lengths"]
)
def _decode_attention(
    qkv, positions, table, keys, values, key_scales, value_scales, block_table, lengths, out, partials, sums, counters,
    split_stride, row_stride, axis_stride, table_rows, scale_stride, block_table_stride, list_stride, splits,
    softmax_scale,
    S: tl.constexpr, GROUP: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr,
    FIRST: tl.constexpr, SECOND: tl.constexpr, BLOCK_SIZE: tl.constexpr, SCALED: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, TOGETHER: tl.constexpr, LISTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (split, KV head, sequence). LISTS: block tables and lengths are what the kernel in front writes."""
    pdl_launch(PDL)
    split = tl.program_id(0)
    head = tl.program_id(1)
    sequence = tl.program_id(2).to(tl.int64)
    dtype: tl.constexpr = out.dtype.element_ty
    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, D)
    real = (rows < GROUP)[:, None]
    out += (sequence * KV_HEADS + head) * GROUP * D
    out_at = out + rows[:, None] * D + columns[None, :]

    if LISTS:
        cos, sin = angles(table, positions + sequence, axis_stride, table_rows, HALF, FIRST, SECOND, D)
        pdl_wait(PDL)
    length = tl.load(lengths + sequence)
    old = tl.maximum(length - 1, 0)  # the keys that earlier passes wrote
    tiles = tl.cdiv(old, BLOCK_N)
    share = tl.maximum(tl.cdiv(tiles, splits), 1)
    working = tl.maximum(tl.cdiv(tiles, share), 1)
    first = split * share * BLOCK_N
    end = tl.minimum(first + share * BLOCK_N, old)
    if split >= working:  # and makes room at once for the kernel behind; those that work wait for the one in front
        return
    block_table += sequence * block_table_stride + head * list_stride
    # What no kernel of this pass writes is under way before the queries are there: the first tile, the second's slots.
    slots = find_slots(block_table, first, end, BLOCK_SIZE, BLOCK_N)
    k, k_scale = load_tile(keys, key_scales, slots, first, end, head, scale_stride, KV_HEADS, D, SCALED)
    v, v_scale = load_tile(values, value_scales, slots, first, end, head, scale_stride, KV_HEADS, D, SCALED)
    slots = find_slots(block_table, first + BLOCK_N, end, BLOCK_SIZE, BLOCK_N)
    if not LISTS:
        cos, sin = angles(table, positions + sequence, axis_stride, table_rows, HALF, FIRST, SECOND, D)
        pdl_wait(PDL)
    if length == 0:
        tl.store(out_at, tl.zeros((ROWS, D), dtype), mask=real)
        return

    qkv += sequence * row_stride
    q = rotate(sum_heads(qkv, head * GROUP, GROUP, split_stride, S, ROWS, D), cos, sin, ROWS, D).to(dtype)
    own_k = rotate(sum_heads(qkv, KV_HEADS * GROUP + head, 1, split_stride, S, 1, D), cos, sin, 1, D)
    own_v = sum_heads(qkv, KV_HEADS * GROUP + KV_HEADS + head, 1, split_stride, S, 1, D)

    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    mixed = tl.zeros((ROWS, D), tl.float32)
    for start in range(first, end, BLOCK_N):
        tile_k, tile_k_scale, tile_v, tile_v_scale = k, k_scale, v, v_scale
        next = start + BLOCK_N
        k, k_scale = load_tile(keys, key_scales, slots, next, end, head, scale_stride, KV_HEADS, D, SCALED)
        v, v_scale = load_tile(values, value_scales, slots, next, end, head, scale_stride, KV_HEADS, D, SCALED)
        slots = find_slots(block_table, next + BLOCK_N, end, BLOCK_SIZE, BLOCK_N)
        inside = start + tl.arange(0, BLOCK_N) < end
        mixed, top, total = attend(
            q, tile_k, tile_k_scale, tile_v, tile_v_scale, inside, mixed, top, total, softmax_scale, SCALED
        )

    if split == working - 1:
        # This token's own key and value: from registers, as the cache will give them back.
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
        higher = tl.maximum(top, score)
        shrink = tl.exp2(top - higher)
        weight = tl.exp2(score - higher)
        total = total * shrink + weight
        mixed = mixed * shrink[:, None] + weight[:, None] * own_v
        top = higher

    mixed *= (1.0 / total)[:, None]
    if working == 1:
        tl.store(out_at, mixed.to(dtype), mask=real)
        return
    pair = sequence * KV_HEADS + head
    partials += pair * splits * ROWS * D
    sums += pair * splits * ROWS
    inside = rows[:, None] * D + columns[None, :]
    tl.store(partials + split * ROWS * D + inside, mixed)
    tl.store(sums + split * ROWS + rows, top + tl.log2(total))
    tl.debug_barrier()  # every thread has written before one of them tells
    if tl.atomic_add(counters + pair, 1, sem="acq_rel") < working - 1:
        return
    tl.store(counters + pair, 0)

    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    mixed = tl.zeros((ROWS, D), tl.float32)
    for start in range(0, working, TOGETHER):
        which = start + tl.arange(0, TOGETHER)
        there = (which < working)[None, :]
        at = which[None, :] * ROWS + rows[:, None]
        part_sums = tl.load(sums + at, mask=there, other=float("-inf"), cache_modifier=".cg")
        at = which[None, :, None] * (ROWS * D) + inside[:, None, :]
        parts = tl.load(partials + at, mask=there[:, :, None], other=0.0, cache_modifier=".cg")
        higher = tl.maximum(top, tl.max(part_sums, 1))
        shrink = tl.exp2(top - higher)
        weights = tl.exp2(part_sums - higher[:, None])
        total = total * shrink + tl.sum(weights, 1)
        mixed = mixed * shrink[:, None] + tl.sum(parts * weights[:, :, None], 1)
        top = higher
    tl.store(out_at, (mixed * (1.0 / total)[:, None]).to(dtype), mask=real)


def decode_attention(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    rotary: Rotary,
    cache: LayerCache,
    block_table: torch.Tensor,
    lengths: torch.Tensor,
    heads: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Rotate q and k of one new token a sequence, store its key and value, and attend over all of the sequence's keys.

    Nothing here waits for the GPU, and what is launched depends on shapes only, so it can be captured in a graph. One
    stream of a device at a time: the programs of a launch meet at counters that belong to the device. Positions, block
    table, lengths and the keys of earlier passes are read before the kernel in front has ended, so an ordinary launch
    (not a programmatic dependent one) must stand behind whoever wrote them. A table of chosen blocks and its lengths
    are waited for: the kernel in front may have written them.

    Args:
        qkv: [S, B, (heads + 2 * kv_heads) * head_dim], partial sums over S; head_dim a power of two.
        positions: int32 [3, B].
        block_table: int32 [B, max_blocks], or [B, kv_heads, max_blocks] where each KV head has blocks of its own.
        lengths: int32 [B], keys of each sequence with the new one; 0 for rows that only pad: nothing is stored.
        dtype: the model's.

    Returns:
        [B, heads * head_dim] in `dtype`; zeros in rows that pad.
    """
    parts, batch, _ = qkv.shape
    kv_heads, size = cache.keys.shape[1:]
    if batch * kv_heads > MOST_PAIRS:
        raise ValueError(f"{batch} sequences of {kv_heads} KV heads in one pass, at most {MOST_PAIRS} together")
    splits = min(MOST_SPLITS, max(1, 2 * processors(qkv.device) // (batch * kv_heads)))
    few = batch * kv_heads * splits <= processors(qkv.device)  # one program a processor: more warps hide more
    block_n = 32 if cache.key_scales is not None and not few else 64  # unpacked 8-bit tiles want more registers
    group = heads // kv_heads
    rows = max(16, triton.next_power_of_2(group))
    out = qkv.new_empty(batch, heads * size, dtype=dtype)
    partials = qkv.new_empty(batch * kv_heads * splits * rows * size, dtype=torch.float32)
    sums = qkv.new_empty(batch * kv_heads * splits * rows, dtype=torch.float32)
    key_scales, value_scales, scale_stride = scale_arguments(cache)
    first, second, _ = rotary.sections
    chosen = block_table.dim() == 3
    _decode_attention[(splits, kv_heads, batch)](
        qkv, positions, rotary.table, cache.keys, cache.values, key_scales, value_scales, block_table, lengths,
        out, partials, sums, counters(qkv.device),
        qkv.stride(0), qkv.stride(1), positions.stride(0), rotary.table.shape[1], scale_stride, block_table.stride(0),
        block_table.stride(1) if chosen else 0, splits,
        size**-0.5 * 1.4426950408889634,  # log2(e): the softmax is taken in base 2
        S=parts, GROUP=group, KV_HEADS=kv_heads, D=size, HALF=rotary.table.shape[2], FIRST=first, SECOND=first + second,
        BLOCK_SIZE=cache.block_size, SCALED=cache.key_scales is not None,
        ROWS=rows, BLOCK_N=block_n, TOGETHER=16 if few else 4, LISTS=chosen,
        PDL=PDL, launch_pdl=PDL, num_warps=8 if few else 4,
    )  # fmt: skip
    return out


@once
def processors(device: torch.device) -> int:
    """Streaming multiprocessors; under the interpreter, so many that tests split their short sequences."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 16


@once
def counters(device: torch.device) -> torch.Tensor:
    """int32 [MOST_PAIRS], zero between launches. Made by the first call, which must not be inside of a capture."""
    return torch.zeros(MOST_PAIRS, dtype=torch.int32, device=device)
