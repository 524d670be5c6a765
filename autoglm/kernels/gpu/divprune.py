"""The most diverse of many rows, on a GPU: a greedy choice whose every step needs the one before, by one program."""

import torch
import triton
import triton.language as tl

from autoglm.kernels.reference import sparse as reference_sparse

LEAST = 4096  # places of a program: for fewer rows nothing else is compiled
MOST = 16384  # they stand in registers


def most_diverse(embeddings: torch.Tensor, count: int) -> torch.Tensor:
    """See `Kernels.most_diverse`: the twin's choice, given the same likenesses. Does not wait for the GPU.

    An ordinary launch. More than MOST rows are the twin's: that many launches of a few microseconds each.
    """
    rows = embeddings.shape[0]
    if rows > MOST:
        return reference_sparse.most_diverse(embeddings, count)
    likeness, nearest = reference_sparse.compare(embeddings)
    chosen = torch.empty(count, dtype=torch.int64, device=embeddings.device)
    block = max(LEAST, triton.next_power_of_2(rows))
    _most_diverse[(1,)](likeness, nearest, chosen, rows, count, block, num_warps=min(16, block // 512))
    return chosen


@triton.jit(do_not_specialize=["rows", "count"])
def _most_diverse(likeness, nearest, chosen, rows, count, BLOCK: tl.constexpr):
    """One program. A row's likeness to itself is infinite, so that whatever was chosen never is again."""
    places = tl.arange(0, BLOCK)
    inside = places < rows
    near = tl.load(nearest + places, mask=inside, other=float("inf"))
    row = tl.argmin(near, 0)
    near = tl.load(likeness + row * rows + places, mask=inside, other=float("inf"))
    for _ in range(1, count):
        row = tl.argmin(near, 0)
        near = tl.maximum(near, tl.load(likeness + row * rows + places, mask=inside, other=0.0))
    taken = inside & (near == float("inf"))
    tl.store(chosen + tl.cumsum(taken.to(tl.int32), 0) - 1, places.to(tl.int64), mask=taken)
