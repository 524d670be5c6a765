"""Causal attention of prompts over the paged cache, on a GPU.

Flash attention (Dao 2023, "FlashAttention-2") with keys and values read through the block table. A tile's rows are
(token, query head) pairs of one KV head, so that the heads of a group share what is read, and short chunks fill tiles.
cuDNN's kernel is a tenth faster on one NVIDIA H200 (188 against 212 us for a prompt of 3422 tokens), but plans for
about 70 ms whenever it meets a new length.
"""

import torch
import triton
import triton.language as tl

from autoglm.kernels.base import LayerCache
from autoglm.kernels.gpu.pdl import PDL, pdl_launch, pdl_wait
from autoglm.kernels.gpu.rotary import scale_arguments


@triton.jit
def _attend(
    q, position, mixed, top, total, start, end, head, length, softmax_scale,
    keys, values, key_scales, value_scales, block_table, scale_stride,
    KV_HEADS: tl.constexpr, D: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr, SCALED: tl.constexpr,
    CAUSAL: tl.constexpr,
):  # fmt: skip
    """Go on over the keys from `start` to `end`; CAUSAL where a row may not see all of them."""
    columns = tl.arange(0, D)[None, :]
    for first in tl.range(start, end, BLOCK_N):
        places = first + tl.arange(0, BLOCK_N)
        if CAUSAL:
            inside = places < length
        else:
            inside = tl.full((BLOCK_N,), True, tl.int1)  # known to be true: the compiler drops it
        block = tl.load(block_table + places // BLOCK_SIZE, mask=inside, other=0).to(tl.int64)
        slot = block * BLOCK_SIZE + places % BLOCK_SIZE
        at = (slot * KV_HEADS + head)[:, None] * D + columns
        k = tl.load(keys + at, mask=inside[:, None], other=0.0)
        v = tl.load(values + at, mask=inside[:, None], other=0.0)
        if SCALED:
            scale_at = slot * scale_stride + head
            k = k.to(tl.float32) * tl.load(key_scales + scale_at, mask=inside, other=0.0)[:, None]
            v = v.to(tl.float32) * tl.load(value_scales + scale_at, mask=inside, other=0.0)[:, None]
        scores = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision="ieee")
        if CAUSAL:
            scores = tl.where(places[None, :] <= position[:, None], scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1) * softmax_scale)
        shrink = tl.exp2(top - higher)
        weights = tl.exp2(scores * softmax_scale - higher[:, None])
        total = total * shrink + tl.sum(weights, 1)
        mixed = tl.dot(weights.to(q.dtype), v.to(q.dtype), mixed * shrink[:, None], input_precision="ieee")
        top = higher
    return mixed, top, total


@triton.jit(do_not_specialize_on_alignment=["block_table", "starts", "lengths"])
def _prefill_attention(
    q, keys, values, key_scales, value_scales, block_table, starts, lengths, out,
    q_stride, scale_stride, block_table_stride, softmax_scale,
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, BLOCK_SIZE: tl.constexpr, SCALED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (KV head, tile of rows from the chunk's end, chunk): what takes longest starts first."""
    pdl_launch(PDL)
    pdl_wait(PDL)
    head = tl.program_id(0)
    chunk = tl.program_id(2)
    start = tl.load(starts + chunk)
    tokens = tl.load(starts + chunk + 1) - start
    first_row = (tl.cdiv(tokens * GROUP, BLOCK_M) - 1 - tl.program_id(1)) * BLOCK_M
    if first_row < 0:
        return
    length = tl.load(lengths + chunk)
    block_table += chunk.to(tl.int64) * block_table_stride
    rows = first_row + tl.arange(0, BLOCK_M)
    token = tl.minimum(rows // GROUP, tokens - 1)
    real = (rows < tokens * GROUP)[:, None]
    head_row = head * GROUP + rows % GROUP
    columns = tl.arange(0, D)[None, :]
    packed = (start + token).to(tl.int64)
    tile = tl.load(q + (packed * q_stride + head_row * D)[:, None] + columns)
    position = length - tokens + token

    mixed = tl.zeros((BLOCK_M, D), tl.float32)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    # All rows see the keys up to the first row's token; the last tiles end at the last row's.
    seen = (length - tokens + first_row // GROUP + 1) // BLOCK_N * BLOCK_N
    end = length - tokens + tl.minimum((first_row + BLOCK_M - 1) // GROUP, tokens - 1) + 1
    mixed, top, total = _attend(
        tile, position, mixed, top, total, 0, seen, head, length, softmax_scale,
        keys, values, key_scales, value_scales, block_table, scale_stride,
        KV_HEADS, D, BLOCK_SIZE, BLOCK_N, SCALED, False,
    )  # fmt: skip
    mixed, top, total = _attend(
        tile, position, mixed, top, total, seen, end, head, length, softmax_scale,
        keys, values, key_scales, value_scales, block_table, scale_stride,
        KV_HEADS, D, BLOCK_SIZE, BLOCK_N, SCALED, True,
    )  # fmt: skip
    at = (packed * (KV_HEADS * GROUP * D) + head_row * D)[:, None] + columns
    tl.store(out + at, (mixed * (1.0 / total)[:, None]).to(out.dtype.element_ty), mask=real)


def prefill_attention(
    q: torch.Tensor,
    cache: LayerCache,
    block_table: torch.Tensor,
    starts: torch.Tensor,
    lengths: torch.Tensor,
    longest_chunk: int,
) -> torch.Tensor:
    """Causal attention of chunks, whose keys and values the cache already has.

    Args:
        q: [T, heads, head_dim], rotated, the chunks packed one behind another; rows may lie apart.
        block_table: int32 [n, max_blocks].
        starts: int32 [n + 1], the row where each chunk begins, then T.
        lengths: int32 [n], keys that each sequence has; a chunk's last query stands at the last of them.
        longest_chunk: at least the longest chunk's length.

    Returns:
        [T, heads * head_dim] in q's dtype.
    """
    tokens, heads, size = q.shape
    kv_heads = cache.keys.shape[1]
    group = heads // kv_heads
    out = q.new_empty(tokens, heads * size)
    key_scales, value_scales, scale_stride = scale_arguments(cache)
    block_m, block_n = 128, 64
    # With 128 registers two programs share a processor; what unpacks 8-bit values needs more.
    registers = 128 if cache.key_scales is None else None
    _prefill_attention[(kv_heads, triton.cdiv(longest_chunk * group, block_m), lengths.shape[0])](
        q, cache.keys, cache.values, key_scales, value_scales, block_table, starts, lengths, out,
        q.stride(0), scale_stride, block_table.stride(0),
        size**-0.5 * 1.4426950408889634,  # log2(e): the softmax is taken in base 2
        GROUP=group, KV_HEADS=kv_heads, D=size, BLOCK_SIZE=cache.block_size, SCALED=cache.key_scales is not None,
        BLOCK_M=block_m, BLOCK_N=block_n, PDL=PDL, launch_pdl=PDL, num_warps=8, num_stages=3, maxnreg=registers,
    )  # fmt: skip
    return out
