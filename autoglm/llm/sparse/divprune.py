"""Visual tokens dropped before the language model: the most diverse of each image stay, whatever is asked about it."""

from dataclasses import replace

import torch

from autoglm.kernels.base import Kernels
from autoglm.llm.block_hash import MediaSpan
from autoglm.llm.prompt import Prompt
from autoglm.llm.sparse.policy import Sparsity


def prune(prompt: Prompt, sparsity: Sparsity, kernels: Kernels) -> Prompt:
    """The prompt without the tokens of images that others resemble. What stays keeps its position and order."""
    if prompt.embeddings is None:
        raise ValueError("a prompt without images cannot be pruned")
    stays = torch.ones(len(prompt.token_ids), dtype=torch.bool)
    media: list[MediaSpan] = []
    features: list[torch.Tensor] = []
    dropped = 0
    parts = torch.split(prompt.embeddings, [span.length for span in prompt.media])
    for span, rows in zip(prompt.media, parts, strict=True):
        if span.visual:
            chosen = kernels.most_diverse(rows, sparsity.kept(span.length))
            rows = rows[chosen]
            stays[span.start : span.end] = False
            stays[span.start + chosen.cpu()] = True
        media.append(replace(span, start=span.start - dropped, length=len(rows)))
        features.append(rows)
        dropped += span.length - len(rows)
    token_ids = [token for token, kept in zip(prompt.token_ids, stays.tolist(), strict=True) if kept]
    return Prompt(token_ids, prompt.positions[:, stays], media, torch.cat(features), prompt.next_position)
