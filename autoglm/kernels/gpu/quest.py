"""Quest page selection: the blocks of visual keys that a decoding sequence attends to, one launch a layer."""

from dataclasses import replace

import torch
import triton
import triton.language as tl

from autoglm.kernels.base import AttentionConfig, AttentionMetadata, LayerCache, PageSelection, required
from autoglm.kernels.gpu.pdl import PDL, pdl_launch, pdl_wait
from autoglm.kernels.gpu.rotary import angles, rotate, sum_heads

TILE = 64  # blocks whose bounds are computed together, while the next two tiles are being loaded
SMALL = 512  # up to this many blocks selection is faster: three of their counts fit into one int32


@triton.jit
def _find_blocks(visual_blocks, block_table, first, blocks, TILE: tl.constexpr):
    """Candidate mask and block ids, [TILE] each, of the blocks from index `first`."""
    index = first + tl.arange(0, TILE)
    candidate = tl.load(visual_blocks + index, mask=index < blocks, other=0) == 1
    return candidate, tl.load(block_table + index, mask=index < blocks, other=0).to(tl.int64)


@triton.jit
def _load_bounds(key_bounds, candidate, block, head, KV_HEADS: tl.constexpr, D: tl.constexpr):
    """Minima and maxima [TILE, D] of candidates."""
    at = key_bounds + (block * KV_HEADS + head)[:, None] * 2 * D + tl.arange(0, D)[None, :]
    minima = tl.load(at, mask=candidate[:, None], other=0.0)
    return minima, tl.load(at + D, mask=candidate[:, None], other=0.0)


@triton.jit
def _select(visual_blocks, block_table, bounds, selected, blocks, wanted, MAX_BLOCKS: tl.constexpr):
    """Write the selected blocks, out of up to MAX_BLOCKS; returns the number of candidates."""
    WIDTH: tl.constexpr = 10 if MAX_BLOCKS < 1024 else 21  # bits of a count
    counts: tl.constexpr = tl.int32 if MAX_BLOCKS < 1024 else tl.int64
    MASK: tl.constexpr = (1 << WIDTH) - 1
    indices = tl.arange(0, MAX_BLOCKS)
    exists = indices < blocks
    candidate = tl.load(visual_blocks + indices, mask=exists, other=0) == 1
    block = tl.load(block_table + indices, mask=exists, other=0)
    bits = tl.load(bounds + indices, mask=candidate, other=0.0).to(tl.int32, bitcast=True)
    # Unsigned integers in the order of the bounds: negative ones have all bits flipped, the others their sign.
    order = (bits ^ ((bits >> 31) | -2147483648)).to(tl.uint32, bitcast=True)
    order = tl.where(candidate, order, 0)
    total = tl.sum(candidate.to(tl.int32), 0)
    # The largest threshold that at least `wanted` bounds reach, or any that exactly `wanted` reach; two bits at a time.
    threshold = tl.full((), 0, tl.uint32)
    step = tl.full((), 1 << 30, tl.uint32)
    reached = total
    over = tl.full((), 0, tl.int32)  # bounds above the range still searched
    while (reached > wanted) & (step > 0):
        one = (order >= threshold + step).to(counts)
        two = (order >= threshold + 2 * step).to(counts)
        three = (order >= threshold + 3 * step).to(counts)
        packed = tl.sum(one + (two << WIDTH) + (three << 2 * WIDTH), 0)
        first = (packed & MASK).to(tl.int32)
        second = ((packed >> WIDTH) & MASK).to(tl.int32)
        third = (packed >> 2 * WIDTH).to(tl.int32)
        if third >= wanted:
            reached = third
            threshold += 3 * step
        elif second >= wanted:
            over = third
            reached = second
            threshold += 2 * step
        elif first >= wanted:
            over = second
            reached = first
            threshold += step
        else:
            over = first
        step = step >> 2
    room = wanted - over  # for bounds equal to the threshold; for all of them if exactly `wanted` reach it
    sure = exists & (~candidate | (order > threshold))
    equal = candidate & (order == threshold)
    before = tl.cumsum(sure.to(counts) + (equal.to(counts) << WIDTH), 0)
    equals = (before >> WIDTH).to(tl.int32)
    target = (before & MASK).to(tl.int32) + tl.minimum(equals, room) - 1
    tl.store(selected + target, block, mask=sure | (equal & (equals <= room)))
    return total


@triton.jit(
    do_not_specialize=["axis_stride"], do_not_specialize_on_alignment=["positions", "block_table", "seq_lens", "slots"]
)
def _select_pages(
    qkv, positions, table, key_bounds, block_table, seq_lens, slots, visual_blocks, num_kept,
    bounds, selected, new_seq_lens, split_stride, row_stride, axis_stride, table_rows, block_table_stride, max_blocks,
    S: tl.constexpr, GROUP: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr,
    FIRST: tl.constexpr, SECOND: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr, TILE: tl.constexpr, MAX_BLOCKS: tl.constexpr, SMALL: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (KV head, sequence)."""
    pdl_launch(PDL)
    head = tl.program_id(0)
    sequence = tl.program_id(1).to(tl.int64)
    seq_len = tl.load(seq_lens + sequence)
    blocks = tl.cdiv(seq_len, BLOCK_SIZE)
    block_table += sequence * block_table_stride
    slot = tl.load(slots + sequence).to(tl.int64)
    visual_blocks += slot * max_blocks
    wanted = tl.load(num_kept + slot)
    selected += (sequence * KV_HEADS + head) * max_blocks
    bounds += (sequence * KV_HEADS + head) * max_blocks
    # Everything but `qkv` was written before this pass: start loading it before waiting.
    candidate, block = _find_blocks(visual_blocks, block_table, 0, blocks, TILE)
    minima, maxima = _load_bounds(key_bounds, candidate, block, head, KV_HEADS, D)
    next_candidate, block = _find_blocks(visual_blocks, block_table, TILE, blocks, TILE)
    next_minima, next_maxima = _load_bounds(key_bounds, next_candidate, block, head, KV_HEADS, D)
    last_candidate, block = _find_blocks(visual_blocks, block_table, 2 * TILE, blocks, TILE)
    cos, sin = angles(table, positions + sequence, axis_stride, table_rows, HALF, FIRST, SECOND, D)
    pdl_wait(PDL)

    # The larger product of each channel: positive queries with the maximum, negative ones with the minimum. So the
    # bound of the group's sum needs two sums of queries only.
    q = sum_heads(qkv + sequence * row_stride, head * GROUP, GROUP, split_stride, S, ROWS, D)
    q = rotate(q, cos, sin, ROWS, D).to(key_bounds.dtype.element_ty).to(tl.float32)
    positive = tl.sum(tl.maximum(q, 0.0), 0)[None, :]
    negative = tl.sum(tl.minimum(q, 0.0), 0)[None, :]
    for first in range(0, blocks, TILE):
        tile, tile_minima, tile_maxima = candidate, minima, maxima
        candidate, minima, maxima = next_candidate, next_minima, next_maxima
        next_candidate = last_candidate
        next_minima, next_maxima = _load_bounds(key_bounds, next_candidate, block, head, KV_HEADS, D)
        last_candidate, block = _find_blocks(visual_blocks, block_table, first + 3 * TILE, blocks, TILE)
        bound = tl.sum(tile_maxima.to(tl.float32) * positive + tile_minima.to(tl.float32) * negative, 1)
        tl.store(bounds + first + tl.arange(0, TILE), bound, mask=tile)
    tl.debug_barrier()  # the bounds were written by other threads of this program

    if MAX_BLOCKS > SMALL and blocks > SMALL:
        total = _select(visual_blocks, block_table, bounds, selected, blocks, wanted, MAX_BLOCKS)
    else:
        total = _select(visual_blocks, block_table, bounds, selected, blocks, wanted, min(MAX_BLOCKS, SMALL))
    if head == 0:
        tl.store(new_seq_lens + sequence, seq_len - tl.maximum(total - wanted, 0) * BLOCK_SIZE)


def select_pages(
    *, qkv: torch.Tensor, cache: LayerCache, metadata: AttentionMetadata, pages: PageSelection, config: AttentionConfig
) -> AttentionMetadata:
    """See `Kernels.select_pages`. Does not block; launches depend on shapes only.

    Everything but qkv is read before the previous kernel has completed, so a launch without PDL must follow the kernels
    that wrote it. A kernel that reads the result must wait for this one first.
    """
    key_bounds, table = required(cache.key_bounds), config.rotary_table
    positions, block_table, seq_lens = metadata.positions, metadata.block_table, metadata.seq_lens
    parts, batch, _ = qkv.shape
    kv_heads, _, size = key_bounds.shape[1:]
    group, max_blocks = config.num_heads // kv_heads, block_table.shape[1]
    selected = block_table.new_empty(batch, kv_heads, max_blocks)
    new_seq_lens = torch.empty_like(seq_lens)
    bounds = qkv.new_empty(batch, kv_heads, max_blocks, dtype=torch.float32)
    first, second, _ = config.mrope_section
    _select_pages[(kv_heads, batch)](
        qkv, positions, table, key_bounds, block_table, seq_lens, pages.slots, pages.visual_blocks,
        pages.num_kept, bounds, selected, new_seq_lens, qkv.stride(0), qkv.stride(1), positions.stride(0),
        table.shape[1], block_table.stride(0), max_blocks,
        S=parts, GROUP=group, KV_HEADS=kv_heads, D=size, HALF=table.shape[2],
        FIRST=first, SECOND=first + second, BLOCK_SIZE=cache.block_size,
        ROWS=max(16, triton.next_power_of_2(group)), TILE=TILE,
        MAX_BLOCKS=triton.next_power_of_2(max_blocks), SMALL=SMALL, PDL=PDL, launch_pdl=PDL, num_warps=8,
    )  # fmt: skip
    return replace(metadata, block_table=selected, seq_lens=new_seq_lens)
