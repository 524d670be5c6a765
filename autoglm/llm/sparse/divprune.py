"""The sparse mode `prune`: the most diverse tokens of each image enter the language model, the others are dropped."""

from dataclasses import replace

import torch

from autoglm.kernels.base import Kernels
from autoglm.llm.block_hash import MediaSpan
from autoglm.llm.sequence import Prompt
from autoglm.llm.sparse.policy import num_kept


def prune(prompt: Prompt, ratio: float, kernels: Kernels) -> Prompt:
    """The prompt without redundant image tokens; the others keep their positions and order."""
    if prompt.embeddings is None:
        raise ValueError("a prompt without images cannot be pruned")
    keep = torch.ones(len(prompt.token_ids), dtype=torch.bool)
    media: list[MediaSpan] = []
    embeddings: list[torch.Tensor] = []
    num_dropped = 0
    parts = torch.split(prompt.embeddings, [span.length for span in prompt.media])
    for span, rows in zip(prompt.media, parts, strict=True):
        if span.visual:
            chosen = kernels.divprune(embeddings=rows, count=num_kept(ratio, span.length))
            rows = rows[chosen]
            keep[span.start : span.end] = False
            keep[span.start + chosen.cpu()] = True
        media.append(replace(span, start=span.start - num_dropped, length=len(rows)))
        embeddings.append(rows)
        num_dropped += span.length - len(rows)
    return Prompt(
        token_ids=[token for token, kept in zip(prompt.token_ids, keep.tolist(), strict=True) if kept],
        positions=prompt.positions[:, keep],
        next_position=prompt.next_position,
        media=media,
        embeddings=torch.cat(embeddings),
    )
