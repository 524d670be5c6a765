"""Causal attention in plain PyTorch: dense, and over the paged KV cache."""

import torch
import torch.nn.functional as F


class DenseAttention:
    """Sequences of equal length, each seeing only itself, nothing kept: for training and for comparisons."""

    def __init__(self, batch: int) -> None:
        self.batch = batch

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.unflatten(0, (self.batch, -1)).transpose(1, 2) for t in (q, k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return mixed.transpose(1, 2).flatten(0, 1)
