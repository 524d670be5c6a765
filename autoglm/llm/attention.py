"""Causal attention over the paged KV cache, as the model calls it."""

import torch

from autoglm.checkpoint import TextConfig
from autoglm.kernels.base import Kernels, Rotary
from autoglm.llm.input_batch import Batch
from autoglm.llm.kv_cache import KVCache


class PagedAttention:
    """Attention of one forward pass: each sequence's tokens see its own earlier keys in the cache, and each other."""

    def __init__(self, kernels: Kernels, cache: KVCache, rotary: Rotary, batch: Batch, config: TextConfig) -> None:
        self.kernels = kernels
        self.cache = cache
        self.rotary = rotary
        self.batch = batch
        self.heads = config.num_attention_heads

    def __call__(self, layer: int, qkv: torch.Tensor) -> torch.Tensor:
        """qkv [S, T, (heads + 2 * kv_heads) * head_dim], partial sums, not rotated -> [T, heads * head_dim]."""
        singles = self.batch.singles
        if singles == 0:
            return self._chunks(layer, qkv)
        if singles == qkv.shape[1]:
            return self._singles(layer, qkv)
        return torch.cat((self._singles(layer, qkv[:, :singles]), self._chunks(layer, qkv[:, singles:])))

    def _singles(self, layer: int, qkv: torch.Tensor) -> torch.Tensor:
        batch, n, pages = self.batch, self.batch.singles, self.batch.pages
        positions, table, lengths = batch.positions[:, :n], batch.block_table[:n], batch.lengths[:n]
        if pages is not None and layer >= pages.dense_layers:
            kept = pages.seats, pages.visual, pages.kept
            table, lengths = self.kernels.choose_pages(
                qkv, positions, self.rotary, self.cache.summary(layer), table, lengths, *kept,
                self.cache.block_size, self.heads,
            )  # fmt: skip
        return self.kernels.decode_attention(
            qkv, positions, self.rotary, self.cache.layer(layer), table, lengths, self.heads, self.cache.dtype
        )

    def _chunks(self, layer: int, qkv: torch.Tensor) -> torch.Tensor:
        batch, n, cache = self.batch, self.batch.singles, self.cache.layer(layer)
        q, _, _ = self.kernels.store_keys(
            qkv, batch.positions[:, n:], self.rotary, cache, batch.slots[n:], self.heads, self.cache.dtype
        )
        return self.kernels.prefill_attention(
            q, cache, batch.block_table[n:], batch.starts, batch.lengths[n:], batch.longest_chunk
        )
