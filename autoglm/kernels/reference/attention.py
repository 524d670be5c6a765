"""Reference implementation of the attention kernels; see `Kernels`."""

import torch
import torch.nn.functional as F

from autoglm.kernels.base import AttentionConfig, AttentionMetadata, LayerCache, required

FP8_LIMIT = torch.finfo(torch.float8_e4m3fn).max


def store_kv(
    *,
    qkv: torch.Tensor,
    positions: torch.Tensor,
    slot_mapping: torch.Tensor,
    cache: LayerCache,
    config: AttentionConfig,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    kv_heads, size = cache.keys.shape[1:]
    packed = qkv.float().sum(0).view(qkv.shape[1], -1, size)
    q, k, v = torch.split(packed, [config.num_heads, kv_heads, kv_heads], dim=1)
    angles = gather_angles(config, positions)
    q, k = rotate(q, angles), rotate(k, angles)
    stored = slot_mapping >= 0
    _store(x=k[stored], slots=slot_mapping[stored], stored=cache.keys, scales=cache.key_scales)
    _store(x=v[stored], slots=slot_mapping[stored], stored=cache.values, scales=cache.value_scales)
    return q.to(config.dtype), k.to(config.dtype), v.to(config.dtype)


def decode_attention(
    *, qkv: torch.Tensor, cache: LayerCache, metadata: AttentionMetadata, config: AttentionConfig
) -> torch.Tensor:
    block_table, seq_lens = metadata.block_table, metadata.seq_lens
    rows = torch.arange(len(seq_lens), device=seq_lens.device)
    last = (seq_lens - 1).clamp(min=0)
    tables = block_table if block_table.dim() == 3 else block_table.unsqueeze(1)  # [B, kv_heads or 1, max_blocks]
    slots = tables[rows, 0, last // cache.block_size].long() * cache.block_size + last % cache.block_size
    slot_mapping = slots.where(seq_lens > 0, -1)
    q, _, _ = store_kv(qkv=qkv, positions=metadata.positions, slot_mapping=slot_mapping, cache=cache, config=config)
    indices = torch.arange(max(1, int(seq_lens.max())), device=seq_lens.device)
    valid = indices < seq_lens[:, None]  # [B, max(seq_lens)]
    slots = tables[:, :, indices // cache.block_size].long() * cache.block_size + indices % cache.block_size
    slots = slots.where(valid[:, None], slots[..., :1])  # slots past the end may be uninitialised
    if slots.shape[1] == 1:
        key, value = (t.transpose(1, 2) for t in dequantize_kv(cache, slots[:, 0], config.dtype))
    else:
        per_head = [dequantize_kv(cache, slots[:, head], config.dtype) for head in range(slots.shape[1])]
        key, value = (torch.stack([t[:, :, i] for i, t in enumerate(pair)], 1) for pair in zip(*per_head, strict=True))
    mixed = F.scaled_dot_product_attention(q.unsqueeze(2), key, value, attn_mask=valid[:, None, None], enable_gqa=True)
    return mixed.flatten(1).where(seq_lens[:, None] > 0, 0)


def prefill_attention(*, q: torch.Tensor, cache: LayerCache, metadata: AttentionMetadata) -> torch.Tensor:
    cu_seqlens_q, seq_lens = required(metadata.cu_seqlens_q), metadata.seq_lens
    bounds = cu_seqlens_q.tolist()
    mixed = q.new_zeros(q.shape[0], q.shape[1] * q.shape[2])
    for table, start, end, length in zip(metadata.block_table, bounds[:-1], bounds[1:], seq_lens.tolist(), strict=True):
        if start == end:  # padding
            continue
        indices = torch.arange(length, device=table.device)
        slots = table[indices // cache.block_size].long() * cache.block_size + indices % cache.block_size
        key, value = (t.transpose(0, 1) for t in dequantize_kv(cache, slots, q.dtype))
        # torch's causal bias does not support grouped heads.
        key, value = (t.repeat_interleave(q.shape[1] // t.shape[0], dim=0) for t in (key, value))
        query, bias = q[start:end].transpose(0, 1), _causal(end - start, length)
        part = F.scaled_dot_product_attention(query[None], key[None], value[None], attn_mask=bias)
        mixed[start:end] = part[0].transpose(0, 1).flatten(1)
    return mixed


def _causal(queries: int, keys: int) -> torch.Tensor:
    """A causal mask aligned to the last key, in the form that torch computes fastest."""
    from torch.nn.attention.bias import causal_lower_right  # imports torch's compiler, which takes a second

    return causal_lower_right(queries, keys)  # type: ignore[return-value]


def gather_angles(config: AttentionConfig, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines [T, 1, rotary_dim / 2] at positions [3, T]."""
    angles = config.rotary_table[:, positions.long()]
    runs = torch.split(angles, list(config.mrope_section), dim=-1)  # [2, 3, T, section] each
    cos, sin = torch.cat([run[:, axis] for axis, run in enumerate(runs)], dim=-1).unsqueeze(2)
    return cos, sin


def rotate(x: torch.Tensor, angles: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Rotate neighbouring pairs (GPT-J order) of the first rotary_dim dimensions. x [T, heads, head_dim]"""
    cos, sin = angles
    size = 2 * cos.shape[-1]
    even, odd = x[..., 0:size:2], x[..., 1:size:2]
    rotated = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)
    return torch.cat((rotated, x[..., size:]), dim=-1)


def _store(*, x: torch.Tensor, slots: torch.Tensor, stored: torch.Tensor, scales: torch.Tensor | None) -> None:
    """Store x fp32 [T, kv_heads, head_dim] in `slots` of a cache; for INT8 with the scale of each token and head."""
    if scales is None:
        stored[slots] = x.to(stored.dtype)
    elif stored.dtype == torch.int8:
        largest = x.abs().amax(-1).clamp(min=1e-30)
        scales[slots] = largest / 127
        stored[slots] = (x * (127 / largest).unsqueeze(-1)).round().to(torch.int8)
    else:
        scaled = (x / scales[slots].unsqueeze(-1)).clamp(-FP8_LIMIT, FP8_LIMIT).to(stored.dtype)
        stored.view(torch.uint8)[slots] = scaled.view(torch.uint8)  # indexing FP8 is not supported on every device


def dequantize_kv(cache: LayerCache, slots: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of `slots` [...], each [..., kv_heads, head_dim] in `dtype`."""

    def take(stored: torch.Tensor, scales: torch.Tensor | None) -> torch.Tensor:
        rows = stored.view(torch.uint8).index_select(0, slots.flatten()).view(stored.dtype)
        if scales is not None:
            rows = (rows.float() * scales[slots.flatten()].unsqueeze(-1)).to(dtype)
        return rows.view(*slots.shape, *stored.shape[1:])

    return take(cache.keys, cache.key_scales), take(cache.values, cache.value_scales)
