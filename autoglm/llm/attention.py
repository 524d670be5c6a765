"""Causal attention over the paged KV cache in plain PyTorch."""

from collections.abc import Sequence as Seq

import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right

from autoglm.llm.kv_cache import KVCache
from autoglm.llm.scheduler import Chunk


class PagedAttention:
    """Attention of one forward pass: single tokens (decoding) as one padded batch, longer chunks one by one.

    The pass's tokens lie packed in the order of `chunks`, which must put all chunks of one token first.
    """

    def __init__(self, cache: KVCache, chunks: Seq[Chunk]) -> None:
        self.cache = cache
        device = cache.keys.device
        slots = [block_slots(chunk.sequence.blocks, cache.block_size) for chunk in chunks]
        ends = [chunk.start + chunk.length for chunk in chunks]
        written = [s[chunk.start : end] for chunk, s, end in zip(chunks, slots, ends, strict=True)]
        self.written = torch.cat(written).to(device)
        self.singles = next((i for i, chunk in enumerate(chunks) if chunk.length > 1), len(chunks))
        seen = [s[:end] for s, end in zip(slots, ends, strict=True)]
        self.chunks = [(chunk.length, s.to(device)) for chunk, s in zip(chunks, seen, strict=True)][self.singles :]
        if self.singles:
            # Slot 0 pads; the mask hides it.
            self.padded = torch.nn.utils.rnn.pad_sequence(seen[: self.singles], batch_first=True).to(device)
            lengths = torch.tensor(ends[: self.singles], device=device)
            places = torch.arange(self.padded.shape[1], device=device)
            self.mask = (places < lengths[:, None])[:, None, None, :]  # [B, 1, 1, longest]

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        keys[self.written], values[self.written] = k, v
        parts = []
        if self.singles:
            query = q[: self.singles].unsqueeze(2)  # [B, heads, 1, head_dim]
            key, value = keys[self.padded].transpose(1, 2), values[self.padded].transpose(1, 2)
            mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=self.mask, enable_gqa=True)
            parts.append(mixed.squeeze(2))
        start = self.singles
        for length, seen in self.chunks:
            query = q[start : start + length].transpose(0, 1).unsqueeze(0)
            key, value = (t[seen].transpose(0, 1).unsqueeze(0) for t in (keys, values))
            groups = query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
            # The chunk's last query stands at the last key. torch's causal bias takes no grouped heads.
            bias = causal_lower_right(length, seen.shape[0])
            mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)  # type: ignore[arg-type]
            parts.append(mixed[0].transpose(0, 1))
            start += length
        return torch.cat(parts)


def block_slots(blocks: list[int], block_size: int) -> torch.Tensor:
    """The slots of the tokens 0, 1, 2, ... that lie in these blocks. int64 [len(blocks) * block_size]"""
    return (torch.tensor(blocks)[:, None] * block_size + torch.arange(block_size)).flatten()
