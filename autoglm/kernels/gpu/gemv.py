"""GEMV: one row of activations times a weight, bound by reading the weight.

A layer of the 9B model has 204 MB in INT8, 45 us at 4.5 TB/s. Each program loads a few rows of the weight into
registers before it waits for the previous kernel (so that memory stays busy while that one finishes), and only then
reads the activations. INT8 weights are multiplied by dp4a, four at a time: each four activations become 16-bit integers
with a common scale, in two int8 digits, which is exact to 1/65000 of the largest of the four, finer than bfloat16.
"""

import torch
import triton
import triton.language as tl

from autoglm.kernels.gpu.pdl import INTERPRETED, PDL, pdl_launch, pdl_wait
from autoglm.quantization.int8 import GROUP, Int8Weight

BYTES = 32768  # of the weight per program: 16 loads of 16 bytes a thread
MAX_COLUMNS = 4096  # per program; longer rows are split into partial sums


def gemv(
    x: torch.Tensor, weight: torch.Tensor | Int8Weight, bias: torch.Tensor | None = None, gated: bool = False
) -> torch.Tensor:
    """x [1, K] times the weight.

    Args:
        x: bfloat16; K is a multiple of 8 for bfloat16 weights, of 16 for INT8.
        gated: silu(first half of the outputs) * second half, as bfloat16 [1, N / 2]; needs K <= 8192.

    Returns:
        Partial sums, fp32 [S, 1, N], or the gated product.
    """
    int8 = isinstance(weight, Int8Weight)
    values = weight.values if isinstance(weight, Int8Weight) else weight
    size = values.shape[1]
    outputs = values.shape[0] // (2 if gated else 1)
    scales, offsets, groups, group_offset = None, None, 1, 0
    if isinstance(weight, Int8Weight):
        scales, offsets, groups, group_offset = weight.scales, weight.offsets, weight.groups, weight.group_offset
    splits = 1 if gated else triton.cdiv(size + group_offset, MAX_COLUMNS)
    # Parts begin at multiples of GROUP, so that no group of the weight's scales is split.
    part = triton.cdiv(triton.cdiv(size + group_offset, GROUP), splits) * GROUP
    block_k = triton.next_power_of_2(part)
    rows = max(1, BYTES // (block_k * values.element_size()) // (2 if gated else 1))
    if gated:
        out = torch.empty(1, outputs, device=x.device, dtype=x.dtype)
    else:
        out = torch.empty(splits, 1, outputs, device=x.device)
    _gemv[(triton.cdiv(outputs, rows), splits)](
        x.view(torch.int64) if int8 else x, values.view(torch.int32) if int8 else values, scales, offsets, bias, out,
        outputs, size, part, groups, group_offset, INT8=int8, GATED=gated, ROWS=rows, BLOCK=block_k, GROUP=GROUP,
        PDL=PDL, ASM=not INTERPRETED, num_warps=4, launch_pdl=PDL,
    )  # fmt: skip
    return out


@triton.jit
def _gemv(
    x, weight, scales, offsets, bias, out, N, K: tl.constexpr, PART: tl.constexpr, GROUPS: tl.constexpr,
    GROUP_OFFSET: tl.constexpr, INT8: tl.constexpr, GATED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    GROUP: tl.constexpr, PDL: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    pdl_launch(PDL)
    split = tl.program_id(1)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    PER: tl.constexpr = 4 if INT8 else 1  # weights in one element of the pointer
    columns = split * (PART // PER) + tl.arange(0, BLOCK // PER) - GROUP_OFFSET // PER
    used = (columns >= 0) & (columns < tl.minimum((split + 1) * PART - GROUP_OFFSET, K) // PER)
    inside = (rows < N)[:, None] & used[None, :]
    at = weight + rows[:, None].to(tl.int64) * (K // PER) + columns[None, :]
    first = tl.load(at, mask=inside, other=0, eviction_policy="evict_first")
    if GATED:
        second = tl.load(at + N.to(tl.int64) * (K // PER), mask=inside, other=0, eviction_policy="evict_first")
    pdl_wait(PDL)
    row = tl.load(x + columns, mask=used, other=0)
    total = _dot(first, row, scales, offsets, rows, split, N, K, PART, GROUPS, INT8, ROWS, BLOCK, GROUP, ASM)
    if GATED:
        up = _dot(second, row, scales, offsets, rows + N, split, 2 * N, K, PART, GROUPS, INT8, ROWS, BLOCK, GROUP, ASM)
        total = total / (1 + tl.exp(-total)) * up
    if bias is not None:
        if split == 0:
            total += tl.load(bias + rows, mask=rows < N, other=0.0).to(tl.float32)
    tl.store(out + split * N + rows, total.to(out.dtype.element_ty), mask=rows < N)


@triton.jit
def _dot(
    weight, row, scales, offsets, rows, split, N, K: tl.constexpr, PART: tl.constexpr, GROUPS: tl.constexpr,
    INT8: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """weight [ROWS, BLOCK] and row [BLOCK], or both packed -> fp32 [ROWS], the weight's scales applied."""
    if not INT8:
        return tl.sum(weight.to(tl.float32) * row.to(tl.float32)[None, :], 1)
    else:
        # An int64 holds four bfloat16 values; a bfloat16 is the upper half of an fp32.
        a = row.to(tl.int32)
        b = (row >> 32).to(tl.int32)
        x0 = (a << 16).to(tl.float32, bitcast=True)
        x1 = (a & -65536).to(tl.float32, bitcast=True)
        x2 = (b << 16).to(tl.float32, bitcast=True)
        x3 = (b & -65536).to(tl.float32, bitcast=True)
        largest = tl.maximum(tl.maximum(tl.abs(x0), tl.abs(x1)), tl.maximum(tl.abs(x2), tl.abs(x3)))
        largest = tl.maximum(largest, 1e-30)
        up = 32512.0 / largest
        low, high = _digits(_round(x0 * up), _round(x1 * up), _round(x2 * up), _round(x3 * up), ASM)
        nothing = tl.zeros((ROWS, BLOCK // 4), tl.int32)
        summed = _dp4a(weight, high[None, :] + nothing, nothing, True, ASM) << 8
        summed = _dp4a(weight, low[None, :] + nothing, summed, False, ASM)
        summed = summed.to(tl.float32) * (largest * (1.0 / 32512.0))[None, :]
        inside = rows < N
        if GROUPS == 1:
            total = tl.sum(summed, 1) * tl.load(scales + rows, mask=inside, other=0.0)
            if offsets is not None:
                total += tl.sum(x0 + x1 + x2 + x3) * tl.load(offsets + rows, mask=inside, other=0.0)
        else:
            group = tl.arange(0, BLOCK // GROUP)
            at = rows[:, None] * GROUPS + split * (PART // GROUP) + group[None, :]
            mask = inside[:, None] & ((split * (PART // GROUP) + group) < GROUPS)[None, :]
            parts = tl.sum(tl.reshape(summed, (ROWS, BLOCK // GROUP, GROUP // 4)), 2)
            total = tl.sum(parts * tl.load(scales + at, mask=mask, other=0.0), 1)
            if offsets is not None:
                sums = tl.sum(tl.reshape(x0 + x1 + x2 + x3, (BLOCK // GROUP, GROUP // 4)), 1)
                total += tl.sum(sums[None, :] * tl.load(offsets + at, mask=mask, other=0.0), 1)
        return total


@triton.jit
def _round(x):
    """The nearest integer of |x| < 2^15, in two's complement in the low 16 bits."""
    return (x + 12582912.0).to(tl.int32, bitcast=True)


@triton.jit
def _digits(q0, q1, q2, q3, ASM: tl.constexpr):
    """Four 16-bit integers (in the low bits) -> their low bytes, and their high bytes, in one int32 each."""
    if ASM:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 a, b;
            prmt.b32 a, $2, $3, 0x5140;
            prmt.b32 b, $4, $5, 0x5140;
            prmt.b32 $0, a, b, 0x5410;
            prmt.b32 $1, a, b, 0x7632;
            }""",
            "=r,=r,r,r,r,r", [q0, q1, q2, q3], dtype=(tl.int32, tl.int32), is_pure=True, pack=1,
        )  # fmt: skip
    else:
        low = (q0 & 255) | (q1 & 255) << 8 | (q2 & 255) << 16 | (q3 & 255) << 24
        high = (q0 >> 8 & 255) | (q1 >> 8 & 255) << 8 | (q2 >> 8 & 255) << 16 | (q3 >> 8 & 255) << 24
        return low, high


@triton.jit
def _dp4a(a, b, c, SIGNED: tl.constexpr, ASM: tl.constexpr):
    """c + the dot product of four int8 in a and four int8 or, if not SIGNED, uint8 in b."""
    if ASM:
        if SIGNED:
            return tl.inline_asm_elementwise(
                "dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, c], dtype=tl.int32, is_pure=True, pack=1
            )
        else:
            return tl.inline_asm_elementwise(
                "dp4a.s32.u32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, c], dtype=tl.int32, is_pure=True, pack=1
            )
    else:
        for byte in tl.static_range(4):
            digit = b << (24 - 8 * byte) >> 24
            if not SIGNED:
                digit = digit & 255
            c += (a << (24 - 8 * byte) >> 24) * digit
        return c
