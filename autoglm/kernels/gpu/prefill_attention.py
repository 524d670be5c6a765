"""Causal attention of prompts over the paged cache.

Flash attention (Dao 2023, "FlashAttention-2") with keys and values read through the block table. The rows of a tile are
(token, query head) pairs of one KV head, so that the heads of a group share its loads and short chunks fill tiles.
cuDNN's kernel is 10 % faster on one NVIDIA H200 (188 against 212 us for a prompt of 3422 tokens), but takes about 70 ms
to plan for each new length.
"""

import torch
import triton
import triton.language as tl

from autoglm.kernels.base import AttentionMetadata, LayerCache, required
from autoglm.kernels.gpu.pdl import PDL, pdl_launch, pdl_wait
from autoglm.kernels.gpu.rotary import scale_arguments


@triton.jit
def _attend(
    q, position, acc, max_score, total, start, end, head, seq_len, softmax_scale,
    keys, values, key_scales, value_scales, block_table, scale_stride,
    KV_HEADS: tl.constexpr, D: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr, SCALED: tl.constexpr,
    CAUSAL: tl.constexpr,
):  # fmt: skip
    """Accumulate the keys from `start` to `end`; CAUSAL masks those after a row's position."""
    columns = tl.arange(0, D)[None, :]
    for first in tl.range(start, end, BLOCK_N):
        indices = first + tl.arange(0, BLOCK_N)
        if CAUSAL:
            inside = indices < seq_len
        else:
            inside = tl.full((BLOCK_N,), True, tl.int1)  # a constant, which the compiler removes
        block = tl.load(block_table + indices // BLOCK_SIZE, mask=inside, other=0).to(tl.int64)
        slot = block * BLOCK_SIZE + indices % BLOCK_SIZE
        at = (slot * KV_HEADS + head)[:, None] * D + columns
        k = tl.load(keys + at, mask=inside[:, None], other=0.0)
        v = tl.load(values + at, mask=inside[:, None], other=0.0)
        if SCALED:
            scale_at = slot * scale_stride + head
            k = k.to(tl.float32) * tl.load(key_scales + scale_at, mask=inside, other=0.0)[:, None]
            v = v.to(tl.float32) * tl.load(value_scales + scale_at, mask=inside, other=0.0)[:, None]
        scores = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision="ieee")
        if CAUSAL:
            scores = tl.where(indices[None, :] <= position[:, None], scores, float("-inf"))
        new_max = tl.maximum(max_score, tl.max(scores, 1) * softmax_scale)
        shrink = tl.exp2(max_score - new_max)
        weights = tl.exp2(scores * softmax_scale - new_max[:, None])
        total = total * shrink + tl.sum(weights, 1)
        acc = tl.dot(weights.to(q.dtype), v.to(q.dtype), acc * shrink[:, None], input_precision="ieee")
        max_score = new_max
    return acc, max_score, total


@triton.jit(do_not_specialize_on_alignment=["block_table", "cu_seqlens_q", "seq_lens"])
def _prefill_attention(
    q, keys, values, key_scales, value_scales, block_table, cu_seqlens_q, seq_lens, out,
    q_stride, scale_stride, block_table_stride, softmax_scale,
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, BLOCK_SIZE: tl.constexpr, SCALED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (KV head, tile of rows counted from the chunk's end, chunk): the longest start first."""
    pdl_launch(PDL)
    pdl_wait(PDL)
    head = tl.program_id(0)
    chunk = tl.program_id(2)
    start = tl.load(cu_seqlens_q + chunk)
    tokens = tl.load(cu_seqlens_q + chunk + 1) - start
    first_row = (tl.cdiv(tokens * GROUP, BLOCK_M) - 1 - tl.program_id(1)) * BLOCK_M
    if first_row < 0:
        return
    seq_len = tl.load(seq_lens + chunk)
    block_table += chunk.to(tl.int64) * block_table_stride
    rows = first_row + tl.arange(0, BLOCK_M)
    token = tl.minimum(rows // GROUP, tokens - 1)
    used = (rows < tokens * GROUP)[:, None]
    head_row = head * GROUP + rows % GROUP
    columns = tl.arange(0, D)[None, :]
    packed = (start + token).to(tl.int64)
    tile = tl.load(q + (packed * q_stride + head_row * D)[:, None] + columns)
    position = seq_len - tokens + token

    acc = tl.zeros((BLOCK_M, D), tl.float32)
    max_score = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    # All rows attend to the keys up to the first row's token; the last tiles are causal.
    seen = (seq_len - tokens + first_row // GROUP + 1) // BLOCK_N * BLOCK_N
    end = seq_len - tokens + tl.minimum((first_row + BLOCK_M - 1) // GROUP, tokens - 1) + 1
    acc, max_score, total = _attend(
        tile, position, acc, max_score, total, 0, seen, head, seq_len, softmax_scale,
        keys, values, key_scales, value_scales, block_table, scale_stride,
        KV_HEADS, D, BLOCK_SIZE, BLOCK_N, SCALED, False,
    )  # fmt: skip
    acc, max_score, total = _attend(
        tile, position, acc, max_score, total, seen, end, head, seq_len, softmax_scale,
        keys, values, key_scales, value_scales, block_table, scale_stride,
        KV_HEADS, D, BLOCK_SIZE, BLOCK_N, SCALED, True,
    )  # fmt: skip
    at = (packed * (KV_HEADS * GROUP * D) + head_row * D)[:, None] + columns
    tl.store(out + at, (acc * (1.0 / total)[:, None]).to(out.dtype.element_ty), mask=used)


def prefill_attention(*, q: torch.Tensor, cache: LayerCache, metadata: AttentionMetadata) -> torch.Tensor:
    """See `Kernels.prefill_attention`; q need not be contiguous."""
    cu_seqlens_q, block_table, seq_lens = required(metadata.cu_seqlens_q), metadata.block_table, metadata.seq_lens
    tokens, heads, size = q.shape
    kv_heads = cache.keys.shape[1]
    group = heads // kv_heads
    out = q.new_empty(tokens, heads * size)
    key_scales, value_scales, scale_stride = scale_arguments(cache)
    block_m, block_n = 128, 64
    # With 128 registers two programs share an SM; unpacking 8-bit values needs more.
    registers = 128 if cache.key_scales is None else None
    _prefill_attention[(kv_heads, triton.cdiv(metadata.max_seqlen_q * group, block_m), seq_lens.shape[0])](
        q, cache.keys, cache.values, key_scales, value_scales, block_table, cu_seqlens_q, seq_lens, out,
        q.stride(0), scale_stride, block_table.stride(0),
        size**-0.5 * 1.4426950408889634,  # log2(e): the softmax is taken in base 2
        GROUP=group, KV_HEADS=kv_heads, D=size, BLOCK_SIZE=cache.block_size, SCALED=cache.key_scales is not None,
        BLOCK_M=block_m, BLOCK_N=block_n, PDL=PDL, launch_pdl=PDL, num_warps=8, num_stages=3, maxnreg=registers,
    )  # fmt: skip
    return out
