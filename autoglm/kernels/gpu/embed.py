"""Embedding lookup; the table may be in pinned host memory."""

import torch
import triton
import triton.language as tl


def embed(*, ids: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """See `Kernels.embed`. Rows of a table in host memory are read over PCIe on demand: 8 KB a token.

    Launched without PDL, so that the inputs of a pass (seq_lens, block tables) are visible to all later kernels, also
    to those that read them before they wait.
    """
    size = table.shape[1]
    out = torch.empty(ids.shape[0], size, device=ids.device, dtype=table.dtype)
    block = min(1024, triton.next_power_of_2(size))
    _embed[(ids.shape[0], triton.cdiv(size, block))](ids, table, out, size, BLOCK=block, num_warps=4)
    return out


@triton.jit
def _embed(ids, table, out, SIZE, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(ids + token).to(tl.int64)
    inside = columns < SIZE
    tl.store(out + token * SIZE + columns, tl.load(table + row * SIZE + columns, mask=inside), mask=inside)
