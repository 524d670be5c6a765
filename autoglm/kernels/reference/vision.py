"""Reference implementation of the vision encoder's kernels; see `Kernels`."""

from itertools import groupby

import torch
import torch.nn.functional as F

from autoglm.kernels.base import ResampleFilter, VarlenPacking


def resample(*, pixels: torch.Tensor, resample_filter: ResampleFilter, axis: int) -> torch.Tensor:
    shape = [-1 if i == axis else 1 for i in range(pixels.dim())]
    last = pixels.shape[axis] - 1
    total: torch.Tensor | int = 1 << (ResampleFilter.FRACTION_BITS - 1)
    for i, weights in enumerate(resample_filter.weights.unbind(1)):
        part = pixels.index_select(axis, (resample_filter.starts + i).clamp(max=last))
        total = part.int() * weights.view(shape) + total
    assert isinstance(total, torch.Tensor)
    return (total >> ResampleFilter.FRACTION_BITS).clamp(0, 255).to(torch.uint8)


def patchify(
    *, pixels: torch.Tensor, levels: torch.Tensor, patch_size: int, merge_size: int, temporal_patch_size: int
) -> torch.Tensor:
    patch, merge, frames = patch_size, merge_size, temporal_patch_size
    rows, columns = pixels.shape[0] // patch // merge, pixels.shape[1] // patch // merge
    cut = pixels.view(rows, merge, patch, columns, merge, patch, 3).permute(0, 3, 1, 4, 6, 2, 5)
    channels = torch.arange(3, device=pixels.device).view(3, 1, 1)
    values = levels[channels, cut.int()].unsqueeze(5)  # [rows, columns, merge, merge, channel, 1, patch, patch]
    return values.expand(-1, -1, -1, -1, -1, frames, -1, -1).reshape(rows * columns * merge**2, -1)


def unfilter(*, rows: torch.Tensor, channels: int) -> torch.Tensor:
    height, width = rows.shape[0], (rows.shape[1] - 1) // channels
    kinds = rows[:, :1].int()
    filtered = rows[:, 1:].view(height, width, channels)[..., :3].int()
    pixels = filtered.new_zeros(height + 1, width + 1, 3)  # with a row above and a column left of the image
    for step in range(height + width - 1):
        y = torch.arange(max(0, step - width + 1), min(height, step + 1), device=rows.device)
        x = step - y
        left, up, corner = pixels[y + 1, x], pixels[y, x + 1], pixels[y, x]
        straight, across, both = (up - corner).abs(), (left - corner).abs(), (left + up - 2 * corner).abs()
        paeth = torch.where(across <= both, up, corner)
        paeth = torch.where((straight <= across) & (straight <= both), left, paeth)
        guesses = torch.stack((torch.zeros_like(left), left, up, (left + up) >> 1, paeth))
        guess = guesses.gather(0, kinds[y].expand_as(left).long()[None])[0]
        pixels[y + 1, x + 1] = (filtered[y, x] + guess) & 255
    return pixels[1:, 1:].to(torch.uint8)


def pack_varlen(*, lengths: tuple[int, ...], device: torch.device) -> VarlenPacking:
    return VarlenPacking(lengths)


def rotate_heads(
    *, qkv: torch.Tensor, angles: torch.Tensor, num_heads: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    packed = qkv[0] if qkv.shape[0] == 1 else qkv.sum(0)
    q, k, v = packed.to(dtype).view(qkv.shape[1], 3, num_heads, -1).unbind(1)
    return rotate_halves(q, angles), rotate_halves(k, angles), v


def rotate_halves(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Rotate the halves of each head against each other, in fp32. x [N, heads, head_dim]."""
    cos, sin = angles.unsqueeze(2)
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def image_attention(*, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packing: VarlenPacking) -> torch.Tensor:
    parts = []
    start = 0
    for length, run in groupby(packing.lengths):  # consecutive images of equal length form a batch
        images = len(list(run))
        part = slice(start, start + images * length)
        query, key, value = (t[part].view(images, length, *t.shape[1:]).transpose(1, 2) for t in (q, k, v))
        mixed = F.scaled_dot_product_attention(query, key, value)
        parts.append(mixed.transpose(1, 2).reshape(images * length, -1))
        start = part.stop
    return parts[0] if len(parts) == 1 else torch.cat(parts)
