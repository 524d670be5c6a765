"""Reference implementation of page selection and DivPrune; see `Kernels`."""

from dataclasses import replace

import torch
import torch.nn.functional as F

from autoglm.kernels.base import AttentionConfig, AttentionMetadata, LayerCache, PageSelection, required
from autoglm.kernels.reference.attention import gather_angles, rotate


def select_pages(
    *, qkv: torch.Tensor, cache: LayerCache, metadata: AttentionMetadata, pages: PageSelection, config: AttentionConfig
) -> AttentionMetadata:
    key_bounds, slots = required(cache.key_bounds), pages.slots.long()
    block_table, seq_lens, block_size = metadata.block_table, metadata.seq_lens, cache.block_size
    kv_heads, _, size = key_bounds.shape[1:]
    q = qkv.float().sum(0).view(len(seq_lens), -1, size)[:, : config.num_heads]
    q = rotate(q, gather_angles(config, metadata.positions)).to(key_bounds.dtype).float()
    q = q.view(len(q), kv_heads, -1, size)
    indices = torch.arange(block_table.shape[1], device=seq_lens.device)
    exists = indices < -(-seq_lens[:, None] // block_size)  # [B, max_blocks]
    candidate = exists & (pages.visual_blocks[slots] == 1)
    blocks = block_table.where(candidate, 0).long()
    minima, maxima = key_bounds[blocks].float().unbind(3)  # [B, max_blocks, kv_heads, D]
    # The larger product of each channel: positive queries with the maximum, negative ones with the minimum.
    bounds = torch.einsum("bhd,bphd->bhp", q.clamp(min=0).sum(2), maxima)
    bounds += torch.einsum("bhd,bphd->bhp", q.clamp(max=0).sum(2), minima)
    bounds = bounds.masked_fill(~candidate.unsqueeze(1), float("-inf"))
    rank = bounds.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    kept = pages.num_kept[slots]
    selected = exists.unsqueeze(1) & (~candidate.unsqueeze(1) | (rank < kept[:, None, None]))
    order = (~selected).long().argsort(dim=-1, stable=True)
    table = block_table.unsqueeze(1).expand(-1, kv_heads, -1).gather(2, order)
    dropped = (candidate.sum(1) - kept).clamp(min=0)
    return replace(metadata, block_table=table, seq_lens=(seq_lens - dropped * block_size).to(torch.int32))


def divprune(*, embeddings: torch.Tensor, count: int) -> torch.Tensor:
    similarity, nearest = compute_similarity(embeddings)
    chosen = torch.empty(count, dtype=torch.int64, device=embeddings.device)
    for step in range(count):
        row = nearest.argmin(0, keepdim=True)
        chosen[step : step + 1] = row
        similar = similarity.index_select(0, row)[0]
        nearest = torch.maximum(nearest, similar) if step else similar
    return chosen.sort().values


def compute_similarity(embeddings: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The similarity of rows [n, hidden]; rows with NaN are not similar to any.

    Returns:
        The cosines between them, fp32 [n, n], with infinity on the diagonal; and each row's largest with another, [n].
    """
    x = F.normalize(embeddings.float(), dim=-1).nan_to_num_()
    similarity = (x @ x.T).fill_diagonal_(-1)
    nearest = similarity.amax(1)
    return similarity.fill_diagonal_(float("inf")), nearest
