"""Fused residual addition and RMS norms, and dynamic quantisation of rows."""

import torch
import triton
import triton.language as tl

from autoglm.kernels.base import Activation
from autoglm.kernels.gpu.pdl import PDL, pdl_launch, pdl_wait


def add_norm(
    *,
    branch: torch.Tensor | None,
    residual: torch.Tensor,
    branch_norm: torch.Tensor | None,
    norm: torch.Tensor,
    eps: float,
    quantized: bool,
) -> tuple[Activation, torch.Tensor]:
    """See `Kernels.add_norm`. One program for each row; `residual` is changed in place."""
    rows, size = residual.shape
    x, scales = _rows(residual, quantized)
    splits = 0 if branch is None else branch.shape[0]
    block = triton.next_power_of_2(size)
    _add_norm[(rows,)](
        branch, residual, branch_norm, norm, x, scales, rows, eps, size, splits, block, quantized, PDL=PDL,
        num_warps=min(16, max(1, block // 256)), launch_pdl=PDL,
    )  # fmt: skip
    return Activation(x, scales), residual


def quantize(*, x: torch.Tensor) -> Activation:
    """See `Kernels.quantize`."""
    rows, size = x.shape
    values, scales = _rows(x, True)
    block = triton.next_power_of_2(size)
    _quantize[(rows,)](x, values, scales, size, block, PDL=PDL, num_warps=min(16, max(1, block // 512)), launch_pdl=PDL)
    return Activation(values, scales)


def _rows(like: torch.Tensor, quantized: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    if not quantized:
        return torch.empty_like(like), None
    return torch.empty_like(like, dtype=torch.int8), torch.empty(like.shape[0], device=like.device)


@triton.jit(do_not_specialize=["rows"])
def _add_norm(
    branch, residual, branch_norm, norm, x, scales, rows, eps,
    SIZE: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr, QUANTIZED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    pdl_launch(PDL)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < SIZE
    weight = tl.load(norm + columns, mask=inside, other=0.0)
    if branch_norm is not None:
        branch_weight = tl.load(branch_norm + columns, mask=inside, other=0.0)
    pdl_wait(PDL)
    dtype = residual.dtype.element_ty
    wide = tl.load(residual + row * SIZE + columns, mask=inside, other=0.0).to(tl.float32)
    if SPLITS > 0:
        total = tl.zeros((BLOCK,), tl.float32)
        for split in tl.static_range(SPLITS):
            total += tl.load(branch + (split * rows + row) * SIZE + columns, mask=inside, other=0.0).to(tl.float32)
        if branch_norm is not None:
            total = total * tl.rsqrt(tl.sum(total * total) / SIZE + eps) * branch_weight.to(tl.float32)
        # Round the residual stream to the model's dtype.
        wide = (wide + total).to(dtype).to(tl.float32)
        tl.store(residual + row * SIZE + columns, wide.to(dtype), mask=inside)
    wide = wide * tl.rsqrt(tl.sum(wide * wide) / SIZE + eps) * weight.to(tl.float32)
    if QUANTIZED:
        _store_quantized(wide, x, scales, row, columns, inside, SIZE)
    else:
        tl.store(x + row * SIZE + columns, wide.to(dtype), mask=inside)


@triton.jit
def _quantize(x, values, scales, SIZE: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    pdl_launch(PDL)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < SIZE
    pdl_wait(PDL)
    wide = tl.load(x + row * SIZE + columns, mask=inside, other=0.0).to(tl.float32)
    _store_quantized(wide, values, scales, row, columns, inside, SIZE)


@triton.jit
def _store_quantized(wide, values, scales, row, columns, inside, SIZE: tl.constexpr):
    largest = tl.maximum(tl.max(tl.abs(wide)), 1e-30)
    # Adding 1.5 * 2^23 leaves the nearest integer (ties to even) in the low bits of the mantissa.
    magic = (wide * (127.0 / largest) + 12582912.0).to(tl.int32, bitcast=True)
    tl.store(values + row * SIZE + columns, magic.to(tl.int8), mask=inside)
    tl.store(scales + row, largest / 127.0)
