"""DivPrune: a greedy choice whose every step depends on the previous one, in a single program."""

import torch
import triton
import triton.language as tl

from autoglm.kernels.reference import sparse as reference_sparse

MIN_BLOCK = 4096  # smaller inputs share one compiled kernel
MAX_BLOCK = 16384  # rows, which are held in registers


def divprune(*, embeddings: torch.Tensor, count: int) -> torch.Tensor:
    """See `Kernels.divprune`: the same choice as the reference, given the same similarities. Does not block.

    Launched without PDL. More than MAX_BLOCK rows use the reference, which takes several launches per chosen row.
    """
    rows = embeddings.shape[0]
    if rows > MAX_BLOCK:
        return reference_sparse.divprune(embeddings=embeddings, count=count)
    similarity, nearest = reference_sparse.compute_similarity(embeddings)
    chosen = torch.empty(count, dtype=torch.int64, device=embeddings.device)
    block = max(MIN_BLOCK, triton.next_power_of_2(rows))
    _divprune[(1,)](similarity, nearest, chosen, rows, count, block, num_warps=min(16, block // 512))
    return chosen


@triton.jit(do_not_specialize=["rows", "count"])
def _divprune(similarity, nearest, chosen, rows, count, BLOCK: tl.constexpr):
    """One program. A row's similarity to itself is infinite, so that no row is chosen twice."""
    indices = tl.arange(0, BLOCK)
    inside = indices < rows
    near = tl.load(nearest + indices, mask=inside, other=float("inf"))
    row = tl.argmin(near, 0)
    near = tl.load(similarity + row * rows + indices, mask=inside, other=float("inf"))
    for _ in range(1, count):
        row = tl.argmin(near, 0)
        near = tl.maximum(near, tl.load(similarity + row * rows + indices, mask=inside, other=0.0))
    taken = inside & (near == float("inf"))
    tl.store(chosen + tl.cumsum(taken.to(tl.int32), 0) - 1, indices.to(tl.int64), mask=taken)
