"""Attention that keeps a part of the visual keys, in plain PyTorch.

The exact choice, what `snap` measures, and the twins of the kernels that choose blocks and tokens.
"""

import torch
import torch.nn.functional as F

from autoglm.kernels.base import Rotary
from autoglm.kernels.reference.attention import gather_angles, rotate

AT_ONCE = 64  # queries, which bounds the memory for their weights


def topk_attention(
    q: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    places: torch.Tensor,
    visual: torch.Tensor,
    counts: torch.Tensor,
) -> torch.Tensor:
    """Attention of text tokens that keep the visual keys with the greatest weights; of equals the first.

    Args:
        q: [n, heads, head_dim], rotated.
        key, value: [length, kv_heads, head_dim], all keys of the sequence so far.
        places: int64 [n], where the queries stand among the keys; they see up to there.
        visual: bool [length].
        counts: int64 [n], how many visual keys each query keeps.

    Returns:
        [n, heads * head_dim] in q's dtype.
    """
    slices = [slice(start, start + AT_ONCE) for start in range(0, len(q), AT_ONCE)]
    return torch.cat([_topk(q[few], places[few], counts[few], key, value, visual) for few in slices])


def _topk(
    q: torch.Tensor,
    places: torch.Tensor,
    counts: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    visual: torch.Tensor,
) -> torch.Tensor:
    weights = attention_weights(q, key, places)  # [kv_heads, group, n, length]
    strength = weights.sum(1).masked_fill(~visual, -1)
    order = strength.argsort(dim=-1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(-1, order, torch.arange(len(visual), device=q.device).expand_as(order))
    dropped = visual & (rank >= counts[:, None])
    weights = weights.masked_fill(dropped.unsqueeze(1), 0)
    weights /= weights.sum(-1, keepdim=True)
    mixed = weights @ value.float().transpose(0, 1).unsqueeze(1)
    return mixed.permute(2, 0, 1, 3).reshape(len(q), -1).to(q.dtype)


def visual_attention(q: torch.Tensor, key: torch.Tensor, places: torch.Tensor, visual: torch.Tensor) -> torch.Tensor:
    """How much weight the visual keys get from all queries and all query heads of each group.

    Args:
        q: [n, heads, head_dim], rotated.
        key: [length, kv_heads, head_dim].
        places: int64 [n], where the queries stand among the keys; they see up to there.
        visual: int64 [v], places of the visual keys.

    Returns:
        fp32 [kv_heads, v].
    """
    return attention_weights(q, key, places)[..., visual].sum((1, 2))


def attention_weights(q: torch.Tensor, key: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """The softmax over all keys up to the query's place: fp32 [kv_heads, group, n, length]."""
    kv_heads, size = key.shape[1:]
    q = q.float().view(len(q), kv_heads, -1, size).permute(1, 2, 0, 3)
    scores: torch.Tensor = q @ key.float().permute(1, 2, 0).unsqueeze(1) * size**-0.5
    hidden = torch.arange(len(key), device=key.device) > places[:, None]
    return scores.masked_fill(hidden, float("-inf")).softmax(-1)


def choose_pages(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    rotary: Rotary,
    summaries: torch.Tensor,
    block_table: torch.Tensor,
    lengths: torch.Tensor,
    seats: torch.Tensor,
    visual: torch.Tensor,
    kept: torch.Tensor,
    block_size: int,
    heads: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    kv_heads, _, size = summaries.shape[1:]
    q = qkv.float().sum(0).view(len(lengths), -1, size)[:, :heads]
    q = rotate(q, gather_angles(rotary, positions)).to(summaries.dtype).float().view(len(q), kv_heads, -1, size)
    places = torch.arange(block_table.shape[1], device=lengths.device)
    exists = places < -(-lengths[:, None] // block_size)  # [B, max_blocks]
    candidate = exists & (visual[seats.long()] == 1)
    least, greatest = (
        summaries[block_table.where(candidate, 0).long()].float().unbind(3)
    )  # [B, max_blocks, kv_heads, D]
    # Each channel's larger product: the maximum meets what is positive of a query, the minimum what is negative.
    bounds = torch.einsum("bhd,bphd->bhp", q.clamp(min=0).sum(2), greatest)
    bounds += torch.einsum("bhd,bphd->bhp", q.clamp(max=0).sum(2), least)
    bounds = bounds.masked_fill(~candidate.unsqueeze(1), float("-inf"))
    rank = bounds.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    stays = exists.unsqueeze(1) & (~candidate.unsqueeze(1) | (rank < kept[seats.long()][:, None, None]))
    order = (~stays).long().argsort(dim=-1, stable=True)
    table = block_table.unsqueeze(1).expand(-1, kv_heads, -1).gather(2, order)
    dropped = (candidate.sum(1) - kept[seats.long()]).clamp(min=0)
    return table, (lengths - dropped * block_size).to(torch.int32)


def most_diverse(embeddings: torch.Tensor, count: int) -> torch.Tensor:
    likeness, nearest = compare(embeddings)
    chosen = torch.empty(count, dtype=torch.int64, device=embeddings.device)
    for step in range(count):
        row = nearest.argmin(0, keepdim=True)
        chosen[step : step + 1] = row
        found = likeness.index_select(0, row)[0]
        nearest = torch.maximum(nearest, found) if step else found
    return chosen.sort().values


def compare(embeddings: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """How much rows [n, hidden] are alike; of those that are no numbers each is like no other.

    Returns:
        The cosines between them, fp32 [n, n], infinite of each with itself; and each one's greatest with another, [n].
    """
    x = F.normalize(embeddings.float(), dim=-1).nan_to_num_()
    likeness = (x @ x.T).fill_diagonal_(-1)
    nearest = likeness.amax(1)
    return likeness.fill_diagonal_(float("inf")), nearest
