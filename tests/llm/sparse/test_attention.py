"""The sparse mode `topk` against dense attention under a mask."""

import math

import pytest
import torch

from autoglm.llm.sparse.attention import CHUNK, topk_attention

HEADS, KV_HEADS, SIZE = 6, 2, 8


@pytest.mark.parametrize("ratio", [0.2, 0.5, 1.0])
@pytest.mark.parametrize("first", [40, 7])
def test_topk_equals_dense_attention_under_a_mask(ratio: float, first: int) -> None:
    """Images at 3 to 16 and 20 to 34 of 40 + CHUNK keys; a query between them attends to the first one only."""
    torch.manual_seed(first)
    length = 40 + CHUNK
    visual = torch.zeros(length, dtype=torch.bool)
    visual[3:17] = visual[20:35] = True
    indices = torch.tensor([p for p in range(first, length) if not visual[p]])
    counts = torch.tensor([math.ceil(ratio * int(visual[:p].sum())) for p in indices.tolist()])
    q = torch.randn(len(indices), HEADS, SIZE)
    key, value = torch.randn(2, length, KV_HEADS, SIZE)
    mixed = topk_attention(q=q, key=key, value=value, indices=indices, visual=visual, counts=counts)
    for row, (index, count) in enumerate(zip(indices.tolist(), counts.tolist(), strict=True)):
        for kv_head in range(KV_HEADS):
            group = q[row].view(KV_HEADS, -1, SIZE)[kv_head]
            scores = group @ key[: index + 1, kv_head].T / math.sqrt(SIZE)
            strength = scores.softmax(-1).sum(0)
            seen = visual[: index + 1].nonzero()[:, 0]
            mask = ~visual[: index + 1]
            mask[seen[strength[seen].topk(count).indices]] = True
            assert int(mask.sum()) == index + 1 - len(seen) + count
            expected = scores.masked_fill(~mask, -torch.inf).softmax(-1) @ value[: index + 1, kv_head]
            torch.testing.assert_close(mixed[row].view(KV_HEADS, -1, SIZE)[kv_head], expected)
