"""Which blocks of visual keys a decoding sequence looks at, on a GPU: one launch a layer, in front of the attention."""

import torch
import triton
import triton.language as tl

from autoglm.kernels.base import Rotary
from autoglm.kernels.gpu.pdl import PDL, pdl_launch, pdl_wait
from autoglm.kernels.gpu.rotary import angles, rotate, sum_heads

TILE = 64  # blocks whose bounds are computed at a time, while those of two tiles more are on their way
FEW = 512  # blocks among which the choice is faster: three counts of them fit into one number


@triton.jit
def _find_blocks(visual, block_table, first, blocks, TILE: tl.constexpr):
    """Which of the blocks `first`, ... are candidates [TILE], and where they lie."""
    place = first + tl.arange(0, TILE)
    candidate = tl.load(visual + place, mask=place < blocks, other=0) == 1
    return candidate, tl.load(block_table + place, mask=place < blocks, other=0).to(tl.int64)


@triton.jit
def _load_summaries(summaries, candidate, block, head, KV_HEADS: tl.constexpr, D: tl.constexpr):
    """Minima and maxima [TILE, D] of candidates."""
    at = summaries + (block * KV_HEADS + head)[:, None] * 2 * D + tl.arange(0, D)[None, :]
    least = tl.load(at, mask=candidate[:, None], other=0.0)
    return least, tl.load(at + D, mask=candidate[:, None], other=0.0)


@triton.jit
def _choose(visual, block_table, bounds, chosen, blocks, wanted, PLACES: tl.constexpr):
    """Write the blocks that stay, out of up to PLACES: -> how many candidates there were."""
    WIDTH: tl.constexpr = 10 if PLACES < 1024 else 21  # bits of a count
    counts: tl.constexpr = tl.int32 if PLACES < 1024 else tl.int64
    MASK: tl.constexpr = (1 << WIDTH) - 1
    places = tl.arange(0, PLACES)
    exists = places < blocks
    candidate = tl.load(visual + places, mask=exists, other=0) == 1
    block = tl.load(block_table + places, mask=exists, other=0)
    bits = tl.load(bounds + places, mask=candidate, other=0.0).to(tl.int32, bitcast=True)
    # Whole numbers in the order of the bounds: all bits of those below 0 turned round, the sign of the others.
    order = (bits ^ ((bits >> 31) | -2147483648)).to(tl.uint32, bitcast=True)
    order = tl.where(candidate, order, 0)
    total = tl.sum(candidate.to(tl.int32), 0)
    # The greatest number that at least `wanted` bounds reach, two bits at a time; or any that just so many reach.
    threshold = tl.full((), 0, tl.uint32)
    step = tl.full((), 1 << 30, tl.uint32)
    reached = total
    over = tl.full((), 0, tl.int32)  # how many bounds lie beyond what is still searched
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
    room = wanted - over  # for bounds equal to the threshold; enough where just `wanted` reach it
    sure = exists & (~candidate | (order > threshold))
    equal = candidate & (order == threshold)
    before = tl.cumsum(sure.to(counts) + (equal.to(counts) << WIDTH), 0)
    equals = (before >> WIDTH).to(tl.int32)
    target = (before & MASK).to(tl.int32) + tl.minimum(equals, room) - 1
    tl.store(chosen + target, block, mask=sure | (equal & (equals <= room)))
    return total


@triton.jit(
    do_not_specialize=["axis_stride"],
    do_not_specialize_on_alignment=["positions", "block_table", "lengths", "seats"],
)
def _choose_pages(
    qkv, positions, table, summaries, block_table, lengths, seats, visual, kept, bounds, chosen, left,
    split_stride, row_stride, axis_stride, table_rows, block_table_stride, max_blocks,
    S: tl.constexpr, GROUP: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr,
    FIRST: tl.constexpr, SECOND: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr, TILE: tl.constexpr, PLACES: tl.constexpr, FEW: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (KV head, sequence)."""
    pdl_launch(PDL)
    head = tl.program_id(0)
    sequence = tl.program_id(1).to(tl.int64)
    length = tl.load(lengths + sequence)
    blocks = tl.cdiv(length, BLOCK_SIZE)
    block_table += sequence * block_table_stride
    seat = tl.load(seats + sequence).to(tl.int64)
    visual += seat * max_blocks
    wanted = tl.load(kept + seat)
    chosen += (sequence * KV_HEADS + head) * max_blocks
    bounds += (sequence * KV_HEADS + head) * max_blocks
    # What no kernel of this pass writes is under way before the queries are there: all but `qkv`.
    candidate, block = _find_blocks(visual, block_table, 0, blocks, TILE)
    least, greatest = _load_summaries(summaries, candidate, block, head, KV_HEADS, D)
    next_candidate, block = _find_blocks(visual, block_table, TILE, blocks, TILE)
    next_least, next_greatest = _load_summaries(summaries, next_candidate, block, head, KV_HEADS, D)
    last_candidate, block = _find_blocks(visual, block_table, 2 * TILE, blocks, TILE)
    cos, sin = angles(table, positions + sequence, axis_stride, table_rows, HALF, FIRST, SECOND, D)
    pdl_wait(PDL)

    # The larger product of each channel: what is positive of a query meets the maximum, what is negative the minimum.
    # So the bound of the group's sum needs two sums of queries only.
    q = sum_heads(qkv + sequence * row_stride, head * GROUP, GROUP, split_stride, S, ROWS, D)
    q = rotate(q, cos, sin, ROWS, D).to(summaries.dtype.element_ty).to(tl.float32)
    positive = tl.sum(tl.maximum(q, 0.0), 0)[None, :]
    negative = tl.sum(tl.minimum(q, 0.0), 0)[None, :]
    for first in range(0, blocks, TILE):
        tile, tile_least, tile_greatest = candidate, least, greatest
        candidate, least, greatest = next_candidate, next_least, next_greatest
        next_candidate = last_candidate
        next_least, next_greatest = _load_summaries(summaries, next_candidate, block, head, KV_HEADS, D)
        last_candidate, block = _find_blocks(visual, block_table, first + 3 * TILE, blocks, TILE)
        bound = tl.sum(tile_greatest.to(tl.float32) * positive + tile_least.to(tl.float32) * negative, 1)
        tl.store(bounds + first + tl.arange(0, TILE), bound, mask=tile)
    tl.debug_barrier()  # what follows reads what other threads of this program have written

    if PLACES > FEW and blocks > FEW:
        total = _choose(visual, block_table, bounds, chosen, blocks, wanted, PLACES)
    else:
        total = _choose(visual, block_table, bounds, chosen, blocks, wanted, min(PLACES, FEW))
    if head == 0:
        tl.store(left + sequence, length - tl.maximum(total - wanted, 0) * BLOCK_SIZE)


def choose_pages(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    rotary: Rotary,
    summaries: torch.Tensor,
    block_table: torch.Tensor,
    lengths: torch.Tensor,
    seats: torch.Tensor,
    visual: torch.Tensor,
    kept: torch.Tensor,
    block_size: int,
    heads: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `Kernels.choose_pages`. Nothing here waits for the GPU, and what is launched depends on shapes only.

    Everything but qkv is read before the kernel in front has ended, so an ordinary launch (not a programmatic dependent
    one) must stand behind whoever wrote it. What reads the result must wait for this kernel first.
    """
    parts, batch, _ = qkv.shape
    kv_heads, _, size = summaries.shape[1:]
    max_blocks = block_table.shape[1]
    chosen = block_table.new_empty(batch, kv_heads, max_blocks)
    left = torch.empty_like(lengths)
    bounds = qkv.new_empty(batch, kv_heads, max_blocks, dtype=torch.float32)
    first, second, _ = rotary.sections
    _choose_pages[(kv_heads, batch)](
        qkv, positions, rotary.table, summaries, block_table, lengths, seats, visual, kept, bounds, chosen, left,
        qkv.stride(0), qkv.stride(1), positions.stride(0), rotary.table.shape[1], block_table.stride(0), max_blocks,
        S=parts, GROUP=heads // kv_heads, KV_HEADS=kv_heads, D=size, HALF=rotary.table.shape[2],
        FIRST=first, SECOND=first + second, BLOCK_SIZE=block_size,
        ROWS=max(16, triton.next_power_of_2(heads // kv_heads)), TILE=TILE, PLACES=triton.next_power_of_2(max_blocks),
        FEW=FEW, PDL=PDL, launch_pdl=PDL, num_warps=8,
    )  # fmt: skip
    return chosen, left
