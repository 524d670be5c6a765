"""Visual tokens dropped before the language model: the most diverse of each image stay, whatever is asked about it."""

from dataclasses import replace

import torch
import torch.nn.functional as F

from autoglm.llm.prefix_keys import MediaSpan
from autoglm.llm.prompt import Prompt
from autoglm.llm.sparsity import Sparsity


def prune(prompt: Prompt, sparsity: Sparsity) -> Prompt:
    """The prompt without the tokens of images that others resemble. What stays keeps its position and its order."""
    if prompt.embeddings is None:
        raise ValueError("a prompt without images cannot be pruned")
    stays = torch.ones(len(prompt.token_ids), dtype=torch.bool)
    media: list[MediaSpan] = []
    features: list[torch.Tensor] = []
    dropped = 0
    parts = torch.split(prompt.embeddings, [span.length for span in prompt.media])
    for span, rows in zip(prompt.media, parts, strict=True):
        chosen = most_diverse(rows, sparsity.kept(span.length)) if span.visual else torch.arange(span.length)
        stays[span.start : span.end] = False
        stays[span.start + chosen.cpu()] = True
        media.append(replace(span, start=span.start - dropped, length=len(chosen)))
        features.append(rows[chosen] if span.visual else rows)
        dropped += span.length - len(chosen)
    token_ids = [token for token, kept in zip(prompt.token_ids, stays.tolist(), strict=True) if kept]
    return Prompt(token_ids, prompt.positions[:, stays], media, torch.cat(features), prompt.next_position)


def most_diverse(embeddings: torch.Tensor, count: int) -> torch.Tensor:
    """Choose `count` rows so that the two that are most alike are as unlike as a greedy choice can make them.

    By cosine, starting with the row whose nearest neighbour is farthest (Alvar et al. 2025, "DivPrune"). Does not wait
    for the device.

    Args:
        embeddings: [n, hidden], n >= count >= 1.

    Returns:
        int64 [count], in ascending order.
    """
    x = F.normalize(embeddings.float(), dim=-1)
    likeness = (x @ x.T).fill_diagonal_(-1)
    nearest = likeness.amax(1)
    chosen = torch.empty(count, dtype=torch.int64, device=x.device)
    for step in range(count):
        row = nearest.argmin(0, keepdim=True)
        chosen[step : step + 1] = row
        found = likeness.index_select(0, row)[0]
        nearest = found.clone() if step == 0 else torch.maximum(nearest, found)
        nearest.index_fill_(0, row, float("inf"))
    return chosen.sort().values
