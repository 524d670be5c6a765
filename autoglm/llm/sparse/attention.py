"""Attention of passes in which text looks at a part of the visual keys, or says which part; see `sparsity`."""

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch

from autoglm.kernels.base import LayerCache
from autoglm.kernels.reference.attention import decode
from autoglm.kernels.reference.sparse import topk_attention, visual_attention
from autoglm.llm.attention import PagedAttention
from autoglm.llm.input_batch import key_slots
from autoglm.llm.scheduler import Chunk
from autoglm.llm.sequence import Sequence
from autoglm.llm.transfer import send


@dataclass(frozen=True)
class View:
    """Tokens of one sequence's text that look at its images in a pass; all int64 on the device."""

    sequence: Sequence
    rows: torch.Tensor  # [n], where the tokens lie in the pass
    places: torch.Tensor  # [n], where they stand in the sequence
    counts: torch.Tensor  # [n], how many visual keys each of them keeps
    slots: torch.Tensor  # [length], the keys up to the last of them
    visual: torch.Tensor  # [v], places of the visual ones


class CrossModalAttention:
    """Dense attention, and then what `topk` and `snap` do beside it. Not to be captured: its shapes follow the pass."""

    def __init__(self, dense: PagedAttention, views: Seq[View]) -> None:
        self.dense = dense
        self.views = views

    def __call__(self, layer: int, qkv: torch.Tensor) -> torch.Tensor:
        """qkv [S, T, (heads + 2 * kv_heads) * head_dim], partial sums, not rotated -> [T, heads * head_dim]."""
        mixed = self.dense(layer, qkv)
        cache = self.dense.cache.layer(layer)
        for view in self.views:
            sparsity, attention = view.sequence.sparsity, view.sequence.attention
            if attention is not None:
                q, key, _ = self._read(view, qkv, cache)
                attention[layer] += visual_attention(q, key, view.places, view.visual)
            elif sparsity is not None and layer >= sparsity.dense_layers:
                q, key, value = self._read(view, qkv, cache)
                is_visual = torch.zeros(len(key), dtype=torch.bool, device=q.device)
                is_visual.index_fill_(0, view.visual, True)
                mixed[view.rows] = topk_attention(q, key, value, view.places, is_visual, view.counts)
        return mixed

    def _read(
        self, view: View, qkv: torch.Tensor, cache: LayerCache
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The view's queries [n, heads, head_dim], keys and values [length, kv_heads, head_dim]."""
        dense, nowhere = self.dense, view.slots.new_full(view.rows.shape, -1)
        rows, positions = qkv[:, view.rows], dense.batch.positions[:, view.rows]
        dtype = dense.cache.dtype
        q, _, _ = dense.kernels.store_keys(rows, positions, dense.rotary, cache, nowhere, dense.heads, dtype)
        return q, *decode(cache, view.slots, dtype)


def find_views(chunks: Seq[Chunk], block_size: int, device: torch.device) -> list[View]:
    """What looks at images in a pass of these chunks that has no padding."""
    starts = accumulate((chunk.length for chunk in chunks), initial=0)
    views = (_view(chunk, row, block_size, device) for chunk, row in zip(chunks, starts, strict=False))
    return [view for view in views if view is not None]


def _view(chunk: Chunk, row: int, block_size: int, device: torch.device) -> View | None:
    sequence, sparsity = chunk.sequence, chunk.sequence.sparsity
    if sparsity is None or not (sparsity.mode == "topk" or sequence.to_thin):
        return None
    visual = np.concatenate([np.arange(span.start, span.end) for span in sequence.images])
    first = sequence.window if sequence.to_thin else int(visual[0])
    places = np.setdiff1d(np.arange(max(chunk.start, first), chunk.end), visual, assume_unique=True)
    if not len(places):
        return None
    before = np.searchsorted(visual, places)
    counts = [sparsity.kept(count) for count in before.tolist()]
    slots = key_slots(sequence, block_size, 0, chunk.end)
    arrays = [places + (row - chunk.start), places, np.array(counts), slots, visual[visual < chunk.end]]
    return View(sequence, *(sent.long() for sent in send([array.astype(np.int32) for array in arrays], device)))
