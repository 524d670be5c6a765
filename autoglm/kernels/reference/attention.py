"""The twins of the attention kernels in plain PyTorch; see the kernels for the arguments."""

import torch
import torch.nn.functional as F

from autoglm.kernels.base import LayerCache, Rotary

FP8_LIMIT = torch.finfo(torch.float8_e4m3fn).max


def store_keys(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    rotary: Rotary,
    cache: LayerCache,
    slots: torch.Tensor,
    heads: int,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    kv_heads, size = cache.keys.shape[1:]
    packed = qkv.float().sum(0).view(qkv.shape[1], -1, size)
    q, k, v = torch.split(packed, [heads, kv_heads, kv_heads], dim=1)
    angles = gather_angles(rotary, positions)
    q, k = rotate(q, angles), rotate(k, angles)
    real = slots >= 0
    encode(k[real], slots[real], cache.keys, cache.key_scales)
    encode(v[real], slots[real], cache.values, cache.value_scales)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def decode_attention(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    rotary: Rotary,
    cache: LayerCache,
    block_table: torch.Tensor,
    lengths: torch.Tensor,
    heads: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    rows = torch.arange(len(lengths), device=lengths.device)
    last = (lengths - 1).clamp(min=0)
    lists = block_table if block_table.dim() == 3 else block_table.unsqueeze(1)  # [B, kv_heads or 1, max_blocks]
    slots = lists[rows, 0, last // cache.block_size].long() * cache.block_size + last % cache.block_size
    q, _, _ = store_keys(qkv, positions, rotary, cache, slots.where(lengths > 0, -1), heads, dtype)
    places = torch.arange(max(1, int(lengths.max())), device=lengths.device)
    seen = places < lengths[:, None]  # [B, longest]
    slots = lists[:, :, places // cache.block_size].long() * cache.block_size + places % cache.block_size
    slots = slots.where(seen[:, None], slots[..., :1])  # what is behind a sequence's end may never have been written
    if slots.shape[1] == 1:
        key, value = (t.transpose(1, 2) for t in decode(cache, slots[:, 0], dtype))
    else:
        heads_own = [decode(cache, slots[:, head], dtype) for head in range(slots.shape[1])]
        key, value = (torch.stack([t[:, :, i] for i, t in enumerate(both)], 1) for both in zip(*heads_own, strict=True))
    mixed = F.scaled_dot_product_attention(q.unsqueeze(2), key, value, attn_mask=seen[:, None, None], enable_gqa=True)
    return mixed.flatten(1).where(lengths[:, None] > 0, 0)


def prefill_attention(
    q: torch.Tensor,
    cache: LayerCache,
    block_table: torch.Tensor,
    starts: torch.Tensor,
    lengths: torch.Tensor,
    longest_chunk: int,
) -> torch.Tensor:
    bounds = starts.tolist()
    mixed = q.new_zeros(q.shape[0], q.shape[1] * q.shape[2])
    for table, start, end, length in zip(block_table, bounds[:-1], bounds[1:], lengths.tolist(), strict=True):
        if start == end:  # it only pads
            continue
        places = torch.arange(length, device=table.device)
        slots = table[places // cache.block_size].long() * cache.block_size + places % cache.block_size
        key, value = (t.transpose(0, 1) for t in decode(cache, slots, q.dtype))
        # torch's causal bias takes no grouped heads.
        key, value = (t.repeat_interleave(q.shape[1] // t.shape[0], dim=0) for t in (key, value))
        query, bias = q[start:end].transpose(0, 1), _causal(end - start, length)
        part = F.scaled_dot_product_attention(query[None], key[None], value[None], attn_mask=bias)
        mixed[start:end] = part[0].transpose(0, 1).flatten(1)
    return mixed


def _causal(queries: int, keys: int) -> torch.Tensor:
    """A causal mask whose last query stands at the last key; torch knows faster ways to use it than a tensor."""
    from torch.nn.attention.bias import causal_lower_right  # brings torch's compiler: a second that no GPU waits for

    return causal_lower_right(queries, keys)  # type: ignore[return-value]


def gather_angles(rotary: Rotary, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines [T, 1, rotary_dim / 2] of tokens at positions [3, T]."""
    runs = torch.split(rotary.table[:, positions.long()], list(rotary.sections), dim=-1)  # [2, 3, T, section] each
    cos, sin = torch.cat([run[:, axis] for axis, run in enumerate(runs)], dim=-1).unsqueeze(2)
    return cos, sin


def rotate(x: torch.Tensor, angles: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Rotate neighbouring pairs (GPT-J order) of the first rotary_dim dimensions. x [T, heads, head_dim]"""
    cos, sin = angles
    size = 2 * cos.shape[-1]
    even, odd = x[..., 0:size:2], x[..., 1:size:2]
    turned = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)
    return torch.cat((turned, x[..., size:]), dim=-1)


def encode(x: torch.Tensor, slots: torch.Tensor, stored: torch.Tensor, scales: torch.Tensor | None) -> None:
    """Write x fp32 [T, kv_heads, head_dim] into `slots` of a cache, with its scales where it has some of its own."""
    if scales is None:
        stored[slots] = x.to(stored.dtype)
    elif stored.dtype == torch.int8:
        largest = x.abs().amax(-1).clamp(min=1e-30)
        scales[slots] = largest / 127
        stored[slots] = (x * (127 / largest).unsqueeze(-1)).round().to(torch.int8)
    else:
        scaled = (x / scales[slots].unsqueeze(-1)).clamp(-FP8_LIMIT, FP8_LIMIT).to(stored.dtype)
        stored.view(torch.uint8)[slots] = scaled.view(torch.uint8)  # torch puts no FP8 on every device


def decode(cache: LayerCache, slots: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of `slots` [...], each [..., kv_heads, head_dim] in `dtype`."""

    def take(stored: torch.Tensor, scales: torch.Tensor | None) -> torch.Tensor:
        rows = stored.view(torch.uint8).index_select(0, slots.flatten()).view(stored.dtype)
        if scales is not None:
            rows = (rows.float() * scales[slots.flatten()].unsqueeze(-1)).to(dtype)
        return rows.view(*slots.shape, *stored.shape[1:])

    return take(cache.keys, cache.key_scales), take(cache.values, cache.value_scales)
