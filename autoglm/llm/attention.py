"""Causal attention over the paged KV cache."""

import torch

from autoglm.kernels.base import AttentionConfig, AttentionMetadata, Kernels, required
from autoglm.llm.input_batch import InputBatch
from autoglm.llm.kv_cache import KVCache


class PagedAttention:
    """The attention of one forward pass: tokens attend to the earlier tokens of their sequence, through the cache."""

    def __init__(self, kernels: Kernels, kv_cache: KVCache, config: AttentionConfig, batch: InputBatch) -> None:
        self.kernels = kernels
        self.kv_cache = kv_cache
        self.config = config
        self.batch = batch

    def __call__(self, layer: int, qkv: torch.Tensor) -> torch.Tensor:
        """qkv [S, T, (num_heads + 2 * kv_heads) * head_dim], partial sums, not rotated -> [T, num_heads * head_dim]."""
        decode, prefill = self.batch.decode, self.batch.prefill
        n = 0 if decode is None else len(decode.seq_lens)
        parts = []
        if decode is not None:
            parts.append(self._decode(layer, qkv[:, :n], decode))
        if prefill is not None:
            parts.append(self._prefill(layer, qkv[:, n:], prefill))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _decode(self, layer: int, qkv: torch.Tensor, metadata: AttentionMetadata) -> torch.Tensor:
        cache, config, pages = self.kv_cache.layer(layer), self.config, self.batch.pages
        if pages is not None and layer >= self.batch.dense_layers:
            metadata = self.kernels.select_pages(qkv=qkv, cache=cache, metadata=metadata, pages=pages, config=config)
        return self.kernels.decode_attention(qkv=qkv, cache=cache, metadata=metadata, config=config)

    def _prefill(self, layer: int, qkv: torch.Tensor, metadata: AttentionMetadata) -> torch.Tensor:
        cache, slot_mapping = self.kv_cache.layer(layer), required(metadata.slot_mapping)
        q, _, _ = self.kernels.store_kv(
            qkv=qkv, positions=metadata.positions, slot_mapping=slot_mapping, cache=cache, config=self.config
        )
        return self.kernels.prefill_attention(q=q, cache=cache, metadata=metadata)
