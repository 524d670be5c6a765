"""Which blocks of visual keys a decoding sequence looks at, on a GPU: one launch a layer, in front of the attention."""

import torch
import triton
import triton.language as tl

from autoglm.kernels import Rotary
from autoglm.kernels.launch import PDL, pdl_launch, pdl_wait
from autoglm.kernels.rotary import angles, rotate, sum_heads

TILE = 128  # blocks whose bounds are computed at a time


@triton.jit
def _choose_pages(
    qkv, positions, table, summaries, block_table, lengths, seats, visual, kept, bounds, chosen, left,
    split_stride, row_stride, axis_stride, table_rows, block_table_stride, max_blocks,
    S: tl.constexpr, GROUP: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr,
    FIRST: tl.constexpr, SECOND: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr, TILE: tl.constexpr, PLACES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (KV head, sequence)."""
    pdl_launch(PDL)
    pdl_wait(PDL)
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

    # The larger product of each channel: what is positive of a query meets the maximum, what is negative the minimum.
    # So the bound of the group's sum needs two sums of queries only.
    cos, sin = angles(table, positions + sequence, axis_stride, table_rows, HALF, FIRST, SECOND, D)
    q = sum_heads(qkv + sequence * row_stride, head * GROUP, GROUP, split_stride, S, ROWS, D)
    q = rotate(q, cos, sin, ROWS, D).to(summaries.dtype.element_ty).to(tl.float32)
    positive = tl.sum(tl.maximum(q, 0.0), 0)[None, :]
    negative = tl.sum(tl.minimum(q, 0.0), 0)[None, :]
    columns = tl.arange(0, D)[None, :]
    for first in range(0, blocks, TILE):
        place = first + tl.arange(0, TILE)
        candidate = tl.load(visual + place, mask=place < blocks, other=0) == 1
        block = tl.load(block_table + place, mask=candidate, other=0).to(tl.int64)
        at = summaries + (block * KV_HEADS + head)[:, None] * 2 * D + columns
        least = tl.load(at, mask=candidate[:, None], other=0.0).to(tl.float32)
        greatest = tl.load(at + D, mask=candidate[:, None], other=0.0).to(tl.float32)
        bound = tl.sum(greatest * positive + least * negative, 1)
        tl.store(bounds + place, bound, mask=candidate)
    tl.debug_barrier()  # what follows reads what other threads of this program have written

    places = tl.arange(0, PLACES)
    exists = places < blocks
    candidate = tl.load(visual + places, mask=exists, other=0) == 1
    bits = tl.load(bounds + places, mask=candidate, other=0.0).to(tl.int32, bitcast=True)
    # Whole numbers in the order of the bounds: all bits of those below 0 turned round, the sign of the others.
    order = (bits ^ ((bits >> 31) | -2147483648)).to(tl.uint32, bitcast=True)
    order = tl.where(candidate, order, 0)
    # The greatest number that at least `wanted` bounds reach, bit by bit.
    threshold = tl.full((), 0, tl.uint32)
    bit = tl.full((), 2147483648, tl.uint32)
    for _ in range(32):
        reached = tl.sum((order >= (threshold | bit)).to(tl.int32), 0)
        threshold = tl.where(reached >= wanted, threshold | bit, threshold)
        bit = bit >> 1
    above = order > threshold
    equal = candidate & (order == threshold)
    room = wanted - tl.sum(above.to(tl.int32), 0)
    stays = exists & (~candidate | above | (equal & (tl.cumsum(equal.to(tl.int32), 0) <= room)))
    target = tl.cumsum(stays.to(tl.int32), 0) - 1
    tl.store(chosen + target, tl.load(block_table + places, mask=stays, other=0), mask=stays)
    if head == 0:
        dropped = blocks - tl.sum(stays.to(tl.int32), 0)
        tl.store(left + sequence, length - dropped * BLOCK_SIZE)


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

    What reads the result must not start before this kernel has ended: it is no programmatic dependent launch.
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
        PDL=PDL, launch_pdl=PDL, num_warps=8,
    )  # fmt: skip
    return chosen, left
