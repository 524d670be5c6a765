"""INT8 GEMM for few rows (2 to 128) of activations, bound by reading the weight.

The weight is the left operand of the tensor cores (its 64 or 128 rows fill the instruction, the activations are its
columns); the tensor memory accelerator loads it into shared memory. If the output has few tiles, K is split so that
every SM has work; the consumer adds the partial sums.
"""

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from autoglm.device import device_info
from autoglm.kernels.base import Activation
from autoglm.kernels.gpu.int8_tile import add_product, apply_scales
from autoglm.kernels.gpu.pdl import PDL, pdl_launch, pdl_wait
from autoglm.quantization.int8 import GROUP, Int8Weight

MAX_ROWS, MAX_ROWS_GATED = 128, 64  # rows of activations


def skinny_gemm(
    x: Activation, weight: Int8Weight, bias: torch.Tensor | None = None, gated: bool = False
) -> torch.Tensor:
    """x int8 [M, K], M <= MAX_ROWS (MAX_ROWS_GATED), times the weight.

    Args:
        gated: silu(first half of the outputs) * second half, as bfloat16 [M, N / 2].

    Returns:
        Partial sums, fp32 [S, M, N], or the gated product. K is a multiple of 16.
    """
    assert x.scales is not None
    rows, size = x.values.shape
    outputs = weight.shape[0] // (2 if gated else 1)
    block, depth, splits, stages = tiling(rows, outputs, size, gated, device_info(x.values.device).num_sms)
    if weight.groups > 1:
        depth = GROUP
        splits = min(splits, triton.cdiv(size + weight.group_offset, depth))
    blocks = triton.cdiv(triton.cdiv(size + weight.group_offset, depth), splits)
    wide = max(16, triton.next_power_of_2(rows))
    if gated:
        out = torch.empty(rows, outputs, device=x.values.device, dtype=torch.bfloat16)
    else:
        out = torch.empty(splits, rows, outputs, device=x.values.device)
    _skinny_gemm[(triton.cdiv(outputs, block), splits)](
        TensorDescriptor(x.values, [rows, size], [size, 1], [wide, depth]), x.scales,
        TensorDescriptor(weight.values, list(weight.shape), [size, 1], [block, depth]), weight.scales, weight.offsets,
        bias, out, rows, outputs, size, blocks, GROUPS=weight.groups, GROUP_OFFSET=weight.group_offset, GATED=gated,
        ROWS=wide, BLOCK=block, DEPTH=depth, STAGES=stages, PDL=PDL, num_warps=4, launch_pdl=PDL,
    )  # fmt: skip
    return out


def tiling(rows: int, outputs: int, size: int, gated: bool, num_sms: int) -> tuple[int, int, int, int]:
    """Rows of the weight and columns of K in a tile, splits of K, stages of the pipeline.

    Tuned on one NVIDIA H200 with the shapes of the 9B model. It is best to have all programs resident at once, two per
    SM, or one where wide activations fill the shared memory.
    """
    if gated:
        return (64, 512, 1, 3) if rows <= 16 else (128, 128, 1, 4)
    tiles = triton.cdiv(outputs, 64)
    if tiles > 2 * num_sms:
        return 128, 128, 1, 4
    if 2 * tiles <= num_sms:
        depth, splits, stages = 256, 2, 6 if rows <= 64 else 4
    else:
        depth, splits, stages = 128, 4 if rows <= 32 else 3, 4
    return 64, depth, min(splits, triton.cdiv(size, depth)), stages


@triton.jit(do_not_specialize=["M"])
def _skinny_gemm(
    x, x_scales, weight, scales, offsets, bias, out, M, N, K, BLOCKS, GROUPS: tl.constexpr,
    GROUP_OFFSET: tl.constexpr, GATED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, DEPTH: tl.constexpr,
    STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    pdl_launch(PDL)
    first = tl.program_id(0) * BLOCK
    split = tl.program_id(1)
    outputs = first + tl.arange(0, BLOCK)
    inside = outputs < N
    KIND: tl.constexpr = tl.int32 if GROUPS == 1 else tl.float32
    total = tl.zeros((BLOCK, ROWS), KIND)
    up = tl.zeros((BLOCK, ROWS), KIND)
    sums = tl.zeros((ROWS,), tl.int32)  # of the activations, for the offsets
    pdl_wait(PDL)
    begin = split * BLOCKS * DEPTH
    end = tl.minimum(begin + BLOCKS * DEPTH, K + GROUP_OFFSET)
    for k in tl.range(begin, end, DEPTH, num_stages=STAGES):  # tiles are groups; columns before the first are 0
        rows = x.load([0, k - GROUP_OFFSET])
        tile = weight.load([first, k - GROUP_OFFSET])
        total = add_product(total, tile, rows, scales, offsets, outputs, inside, k, GROUPS, DEPTH, True)
        if GATED:
            tile = weight.load([N + first, k - GROUP_OFFSET])
            up = add_product(up, tile, rows, scales, offsets, outputs + N, inside, k, GROUPS, DEPTH, True)
        if GROUPS == 1 and offsets is not None:
            sums += tl.sum(rows.to(tl.int32), 1)
    m = tl.arange(0, ROWS)
    row_scales = tl.load(x_scales + m, mask=m < M, other=0.0)
    result = apply_scales(total, sums, scales, offsets, outputs, inside, GROUPS, True) * row_scales[None, :]
    mask = inside[:, None] & (m < M)[None, :]
    if GATED:
        result = result / (1 + tl.exp(-result))
        result *= apply_scales(up, sums, scales, offsets, outputs + N, inside, GROUPS, True) * row_scales[None, :]
    elif bias is not None:
        if split == 0:
            result += tl.load(bias + outputs, mask=inside, other=0.0).to(tl.float32)[:, None]
    tl.store(out + (split * M + m[None, :]) * N + outputs[:, None], result.to(out.dtype.element_ty), mask=mask)
