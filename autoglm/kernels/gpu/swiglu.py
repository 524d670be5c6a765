"""silu(gate) * up, where one tensor holds both side by side."""

import torch
import triton
import triton.language as tl

from autoglm.kernels.gpu.pdl import PDL, pdl_launch, pdl_wait

BLOCK = 2048


def swiglu(x: torch.Tensor) -> torch.Tensor:
    """[T, 2 * N], the gate first -> [T, N]; computed in fp32."""
    rows, width = x.shape[0], x.shape[1] // 2
    out = x.new_empty(rows, width)
    _swiglu[(rows, triton.cdiv(width, BLOCK))](x, out, width, BLOCK, PDL=PDL, launch_pdl=PDL, num_warps=8)
    return out


@triton.jit
def _swiglu(x, out, WIDTH, BLOCK: tl.constexpr, PDL: tl.constexpr):
    pdl_launch(PDL)
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    at = x + row * (2 * WIDTH) + column
    pdl_wait(PDL)
    gate = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(at + WIDTH, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * WIDTH + column, (gate / (1 + tl.exp(-gate)) * up).to(out.dtype.element_ty), mask=inside)
