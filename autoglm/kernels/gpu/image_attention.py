"""Full attention inside each of many packed images, and the rotation of what goes in.

Flash attention (Dao 2023, "FlashAttention-2"). All images share one launch, whatever their lengths are: a table says
which tile of queries belongs to which image, and keys and values reach shared memory through the tensor memory
accelerator. cuDNN's kernel (564 TFLOP/s for 13 416 patches on one NVIDIA H200) takes one length at a time, and plans
for about 70 ms whenever it meets a new one: it is for the long images of a length that comes again.
"""

from collections import Counter
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch.nn.attention import SDPBackend, sdpa_kernel
from triton.tools.tensor_descriptor import TensorDescriptor

from autoglm.kernels.base import Packing
from autoglm.kernels.gpu.pdl import PDL, pdl_launch, pdl_wait
from autoglm.kernels.reference import vision as reference_vision

QUERIES, KEYS = 128, 64  # of a tile
TWO_PROGRAMS = 128  # registers a thread: with two stages two programs share a processor, one's products hide the
# other's exponentials
LONG = 4096  # patches from which on an image may get launches of its own
PLAN = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]

_met: Counter[int] = Counter()


def pack(lengths: tuple[int, ...], device: torch.device) -> Packing:
    """See `Kernels.pack`. A long image goes to cuDNN when a pass before brought one of its length."""
    planned = {length for length in lengths if length >= LONG and _met[length] > 0}
    _met.update(length for length in set(lengths) if length >= LONG)
    apart: list[tuple[int, int]] = []
    others: list[tuple[int, int]] = []
    start = 0
    for length in lengths:
        (apart if length in planned else others).append((start, length))
        start += length
    return Packing(lengths, tuple(apart), _tiles(tuple(others), device) if others else None)


@lru_cache(maxsize=64)
def _tiles(images: tuple[tuple[int, int], ...], device: torch.device) -> torch.Tensor:
    table = [
        (first, start, start + length) for start, length in images for first in range(start, start + length, QUERIES)
    ]
    return torch.tensor(table, dtype=torch.int32).to(device, non_blocking=True)  # must not wait for the pass in front


def image_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packing: Packing) -> torch.Tensor:
    """See `Kernels.image_attention`."""
    rows, heads, size = q.shape
    if q.element_size() != 2 or size not in (16, 32, 64, 128):
        return reference_vision.image_attention(q, k, v, packing)
    if len(packing.apart) == 1 and packing.tiles is None:
        return _planned(q, k, v)
    out = q.new_empty(rows, heads * size)
    for start, length in packing.apart:
        part = slice(start, start + length)
        out[part] = _planned(q[part], k[part], v[part])
    if packing.tiles is not None:
        _packed(q, k, v, packing.tiles, out)
    return out


def _planned(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    with sdpa_kernel(PLAN, set_priority=True):
        return reference_vision.image_attention(q, k, v, Packing((q.shape[0],)))


def _packed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tiles: torch.Tensor, out: torch.Tensor) -> None:
    _, heads, size = q.shape
    _image_attention[(tiles.shape[0], heads)](
        _rows(q, QUERIES), _rows(k, KEYS), _rows(v, KEYS), tiles, out,
        size**-0.5 * 1.4426950408889634,  # log2(e): the softmax is taken in base 2
        HEADS=heads, D=size, QUERIES=QUERIES, KEYS=KEYS, PDL=PDL, launch_pdl=PDL,
        num_warps=8, num_stages=2, maxnreg=TWO_PROGRAMS,
    )  # fmt: skip


def _rows(x: torch.Tensor, height: int) -> TensorDescriptor:
    """Tiles [height, head_dim] of x [N, heads, head_dim], whose rows may lie apart."""
    rows, heads, size = x.shape
    return TensorDescriptor(x, [rows, heads * size], [x.stride(0), 1], [height, size])


@triton.jit
def _image_attention(
    q, k, v, tiles, out, softmax_scale,
    HEADS: tl.constexpr, D: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (tile of queries, head): neighbours share a head's keys and values in the L2 cache."""
    pdl_launch(PDL)
    tile = tiles + tl.program_id(0) * 3
    head = tl.program_id(1)
    first, start, end = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    pdl_wait(PDL)
    query = q.load([first, head * D])
    mixed = tl.zeros((QUERIES, D), tl.float32)
    top = tl.full((QUERIES,), float("-inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    whole = start + (end - start) // KEYS * KEYS
    mixed, top, total = _attend(query, mixed, top, total, k, v, start, whole, end, head, softmax_scale, D, KEYS, False)
    mixed, top, total = _attend(query, mixed, top, total, k, v, whole, end, end, head, softmax_scale, D, KEYS, True)
    rows = first + tl.arange(0, QUERIES)
    at = out + rows.to(tl.int64)[:, None] * (HEADS * D) + head * D + tl.arange(0, D)[None, :]
    tl.store(at, (mixed * (1.0 / total)[:, None]).to(out.dtype.element_ty), mask=(rows < end)[:, None])


@triton.jit
def _attend(
    query, mixed, top, total, k, v, begin, stop, end, head, softmax_scale,
    D: tl.constexpr, KEYS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Go on over the keys from `begin` to `stop`; MASKED where a tile may reach beyond the image's `end`."""
    for place in tl.range(begin, stop, KEYS):
        scores = tl.dot(query, k.load([place, head * D]).T)
        if MASKED:
            scores = tl.where((place + tl.arange(0, KEYS) < end)[None, :], scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1) * softmax_scale)
        shrink = tl.exp2(top - higher)
        weights = tl.exp2(scores * softmax_scale - higher[:, None])
        total = total * shrink + tl.sum(weights, 1)
        mixed = tl.dot(weights.to(query.dtype), v.load([place, head * D]), mixed * shrink[:, None])
        top = higher
    return mixed, top, total


def rotate_heads(
    qkv: torch.Tensor, angles: torch.Tensor, heads: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `Kernels.rotate_heads`. In place where there is one part, in `dtype`: v stays where it is."""
    packed = (qkv[0] if qkv.shape[0] == 1 else qkv.sum(0)).to(dtype)
    rows, width = packed.shape
    half = width // (6 * heads)
    _rotate_heads[(rows,)](
        packed, angles, rows, 2 * heads, half, triton.next_power_of_2(2 * heads), triton.next_power_of_2(half),
        PDL=PDL, launch_pdl=PDL, num_warps=4,
    )  # fmt: skip
    q, k, v = packed.view(rows, 3, heads, 2 * half).unbind(1)
    return q, k, v


@triton.jit(do_not_specialize=["rows"])
def _rotate_heads(
    qkv, angles, rows, HEADS: tl.constexpr, HALF: tl.constexpr, R: tl.constexpr, H: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    """One program for a row; HEADS of q and k together."""
    pdl_launch(PDL)
    row = tl.program_id(0).to(tl.int64)
    pair = tl.arange(0, H)
    turns = pair < HALF
    cos = tl.load(angles + row * HALF + pair, mask=turns, other=0.0)[None, :]
    sin = tl.load(angles + (rows + row) * HALF + pair, mask=turns, other=0.0)[None, :]
    pdl_wait(PDL)
    head = tl.arange(0, R)
    at = qkv + row * (3 * HEADS // 2 * 2 * HALF) + head[:, None] * (2 * HALF) + pair[None, :]
    inside = (head < HEADS)[:, None] & turns[None, :]
    first = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(at + HALF, mask=inside, other=0.0).to(tl.float32)
    dtype = qkv.dtype.element_ty
    tl.store(at, (first * cos - second * sin).to(dtype), mask=inside)
    tl.store(at + HALF, (second * cos + first * sin).to(dtype), mask=inside)
