"""The sparse mode `topk`: attention of passes in which text attends to the strongest visual keys only."""

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch

from autoglm.kernels.reference.attention import dequantize_kv
from autoglm.llm.attention import PagedAttention
from autoglm.llm.input_batch import sequence_slots
from autoglm.llm.scheduler import Chunk
from autoglm.llm.sparse.policy import num_kept
from autoglm.llm.transfer import send

CHUNK = 64  # queries computed together; bounds the memory of their weights


@dataclass(frozen=True)
class SparseView:
    """The text tokens of one sequence that attend to its images in a pass; all tensors int64 on the device."""

    dense_layers: int
    rows: torch.Tensor  # [n], the tokens' rows in the pass
    indices: torch.Tensor  # [n], their indices in the sequence
    num_kept: torch.Tensor  # [n], visual keys that each of them keeps
    slots: torch.Tensor  # [length], cache indices of the keys up to the last of them
    visual: torch.Tensor  # [v], indices of the visual keys among these


class TopKAttention:
    """Dense attention, then recomputed for the views. Its shapes vary between passes, so it is not captured."""

    def __init__(self, dense: PagedAttention, views: Seq[SparseView]) -> None:
        self.dense = dense
        self.views = views

    def __call__(self, layer: int, qkv: torch.Tensor) -> torch.Tensor:
        """qkv [S, T, (num_heads + 2 * kv_heads) * head_dim], partial sums, not rotated -> [T, num_heads * head_dim]."""
        mixed = self.dense(layer, qkv)
        dense, dtype = self.dense, self.dense.kv_cache.dtype
        cache = dense.kv_cache.layer(layer)
        for view in self.views:
            if layer < view.dense_layers:
                continue
            q, _, _ = dense.kernels.store_kv(
                qkv=qkv[:, view.rows],
                positions=dense.batch.positions[:, view.rows],
                slot_mapping=view.slots.new_full(view.rows.shape, -1),
                cache=cache,
                config=dense.config,
            )
            key, value = dequantize_kv(cache, view.slots, dtype)
            is_visual = torch.zeros(len(key), dtype=torch.bool, device=q.device)
            is_visual.index_fill_(0, view.visual, True)
            mixed[view.rows] = topk_attention(
                q=q, key=key, value=value, indices=view.indices, visual=is_visual, counts=view.num_kept
            )
        return mixed


def topk_attention(
    *,
    q: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    indices: torch.Tensor,
    visual: torch.Tensor,
    counts: torch.Tensor,
) -> torch.Tensor:
    """Attention of text tokens to all text keys and the visual keys with the largest weights; ties go to the first.

    Args:
        q: [n, heads, head_dim], rotated.
        key, value: [length, kv_heads, head_dim], all keys of the sequence so far.
        indices: int64 [n], the queries' indices among the keys, which are also the last keys they attend to.
        visual: bool [length].
        counts: int64 [n], visual keys that each query keeps.

    Returns:
        [n, heads * head_dim] in q's dtype.
    """
    parts = []
    for start in range(0, len(q), CHUNK):
        chunk = slice(start, start + CHUNK)
        weights = attention_weights(q[chunk], key, indices[chunk])  # [kv_heads, group, CHUNK, length]
        strength = weights.sum(1).masked_fill(~visual, -1)
        order = strength.argsort(dim=-1, descending=True, stable=True)
        rank = torch.empty_like(order).scatter_(-1, order, torch.arange(len(visual), device=q.device).expand_as(order))
        dropped = visual & (rank >= counts[chunk, None])
        weights = weights.masked_fill(dropped.unsqueeze(1), 0)
        weights /= weights.sum(-1, keepdim=True)
        mixed = weights @ value.float().transpose(0, 1).unsqueeze(1)
        parts.append(mixed.permute(2, 0, 1, 3).flatten(1).to(q.dtype))
    return torch.cat(parts)


def attention_weights(q: torch.Tensor, key: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """The causal attention weights, fp32 [kv_heads, group, n, length]."""
    kv_heads, size = key.shape[1:]
    q = q.float().view(len(q), kv_heads, -1, size).permute(1, 2, 0, 3)
    scores: torch.Tensor = q @ key.float().permute(1, 2, 0).unsqueeze(1) * size**-0.5
    hidden = torch.arange(len(key), device=key.device) > indices[:, None]
    return scores.masked_fill(hidden, float("-inf")).softmax(-1)


def find_views(chunks: Seq[Chunk], block_size: int, device: torch.device) -> list[SparseView]:
    """The views of a pass of these chunks without padding."""
    starts = accumulate((chunk.length for chunk in chunks), initial=0)
    views = (_view(chunk, row, block_size, device) for chunk, row in zip(chunks, starts, strict=False))
    return [view for view in views if view is not None]


def _view(chunk: Chunk, row: int, block_size: int, device: torch.device) -> SparseView | None:
    sequence, sparse = chunk.sequence, chunk.sequence.sparse
    if sparse is None or sparse.mode != "topk":
        return None
    visual = np.concatenate([np.arange(span.start, span.end) for span in sequence.images])
    indices = np.setdiff1d(np.arange(max(chunk.start, int(visual[0])), chunk.end), visual, assume_unique=True)
    if not len(indices):
        return None
    num_before = np.searchsorted(visual, indices)
    kept = np.array([num_kept(sparse.ratio, count) for count in num_before.tolist()])
    slots = sequence_slots(sequence, block_size, 0, chunk.end)
    arrays = [indices + (row - chunk.start), indices, kept, slots, visual[visual < chunk.end]]
    sent = send([array.astype(np.int32) for array in arrays], device)
    return SparseView(sparse.dense_layers, *(each.long() for each in sent))
