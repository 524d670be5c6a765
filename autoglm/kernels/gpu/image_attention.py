"""Full attention within each of many packed images, and the rotary embedding of its inputs.

Flash attention (Dao 2023, "FlashAttention-2"). Images of all lengths share one launch: a table maps each tile of
queries to its image, and the tensor memory accelerator loads keys and values into shared memory. cuDNN's kernel (564
TFLOP/s for 13 416 patches on one NVIDIA H200) handles one length at a time and takes about 70 ms to plan for a new one:
it is used for long images whose length occurs repeatedly.
"""

from collections import Counter
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch.nn.attention import SDPBackend, sdpa_kernel
from triton.tools.tensor_descriptor import TensorDescriptor

from autoglm.kernels.base import VarlenPacking
from autoglm.kernels.gpu.pdl import PDL, pdl_launch, pdl_wait
from autoglm.kernels.reference import vision as reference_vision

QUERIES, KEYS = 128, 64  # of a tile
# Per thread: with two stages two programs share an SM, and the products of one hide the exponentials of the other.
MAX_REGISTERS = 128
LONG = 4096  # patches from which an image may be launched on its own
PLAN = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]

_seen_lengths: Counter[int] = Counter()


def pack_varlen(*, lengths: tuple[int, ...], device: torch.device) -> VarlenPacking:
    """See `Kernels.pack_varlen`. A long image is computed by cuDNN if an earlier pass had one of the same length."""
    with_plan = {length for length in lengths if length >= LONG and _seen_lengths[length] > 0}
    _seen_lengths.update(length for length in set(lengths) if length >= LONG)
    separate: list[tuple[int, int]] = []
    others: list[tuple[int, int]] = []
    start = 0
    for length in lengths:
        (separate if length in with_plan else others).append((start, length))
        start += length
    return VarlenPacking(lengths, tuple(separate), _tiles(tuple(others), device) if others else None)


@lru_cache(maxsize=64)
def _tiles(images: tuple[tuple[int, int], ...], device: torch.device) -> torch.Tensor:
    table = [
        (first, start, start + length) for start, length in images for first in range(start, start + length, QUERIES)
    ]
    return torch.tensor(table, dtype=torch.int32).to(device, non_blocking=True)  # must not wait for the previous pass


def image_attention(*, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packing: VarlenPacking) -> torch.Tensor:
    """See `Kernels.image_attention`."""
    rows, heads, size = q.shape
    if q.element_size() != 2 or size not in (16, 32, 64, 128):
        return reference_vision.image_attention(q=q, k=k, v=v, packing=packing)
    if len(packing.separate) == 1 and packing.tiles is None:
        return _cudnn_attention(q=q, k=k, v=v)
    out = q.new_empty(rows, heads * size)
    for start, length in packing.separate:
        part = slice(start, start + length)
        out[part] = _cudnn_attention(q=q[part], k=k[part], v=v[part])
    if packing.tiles is not None:
        _image_attention[(packing.tiles.shape[0], heads)](
            _rows(q, QUERIES), _rows(k, KEYS), _rows(v, KEYS), packing.tiles, out,
            size**-0.5 * 1.4426950408889634,  # log2(e): the softmax is taken in base 2
            HEADS=heads, D=size, QUERIES=QUERIES, KEYS=KEYS, PDL=PDL, launch_pdl=PDL,
            num_warps=8, num_stages=2, maxnreg=MAX_REGISTERS,
        )  # fmt: skip
    return out


def _cudnn_attention(*, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    with sdpa_kernel(PLAN, set_priority=True):
        return reference_vision.image_attention(q=q, k=k, v=v, packing=VarlenPacking((q.shape[0],)))


def _rows(x: torch.Tensor, height: int) -> TensorDescriptor:
    """Tiles [height, head_dim] of x [N, heads, head_dim], which need not be contiguous."""
    rows, heads, size = x.shape
    return TensorDescriptor(x, [rows, heads * size], [x.stride(0), 1], [height, size])


@triton.jit
def _image_attention(
    q, k, v, tiles, out, softmax_scale,
    HEADS: tl.constexpr, D: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (tile of queries, head): adjacent programs share a head's keys and values in the L2 cache."""
    pdl_launch(PDL)
    tile = tiles + tl.program_id(0) * 3
    head = tl.program_id(1)
    first, start, end = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    pdl_wait(PDL)
    query = q.load([first, head * D])
    acc = tl.zeros((QUERIES, D), tl.float32)
    max_score = tl.full((QUERIES,), float("-inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    whole = start + (end - start) // KEYS * KEYS
    acc, max_score, total = _attend(
        query, acc, max_score, total, k, v, start, whole, end, head, softmax_scale, D, KEYS, False
    )
    acc, max_score, total = _attend(
        query, acc, max_score, total, k, v, whole, end, end, head, softmax_scale, D, KEYS, True
    )
    rows = first + tl.arange(0, QUERIES)
    at = out + rows.to(tl.int64)[:, None] * (HEADS * D) + head * D + tl.arange(0, D)[None, :]
    tl.store(at, (acc * (1.0 / total)[:, None]).to(out.dtype.element_ty), mask=(rows < end)[:, None])


@triton.jit
def _attend(
    query, acc, max_score, total, k, v, begin, stop, end, head, softmax_scale,
    D: tl.constexpr, KEYS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Accumulate the keys from `begin` to `stop`; MASKED if a tile may extend past the image's `end`."""
    for key in tl.range(begin, stop, KEYS):
        scores = tl.dot(query, k.load([key, head * D]).T)
        if MASKED:
            scores = tl.where((key + tl.arange(0, KEYS) < end)[None, :], scores, float("-inf"))
        new_max = tl.maximum(max_score, tl.max(scores, 1) * softmax_scale)
        shrink = tl.exp2(max_score - new_max)
        weights = tl.exp2(scores * softmax_scale - new_max[:, None])
        total = total * shrink + tl.sum(weights, 1)
        acc = tl.dot(weights.to(query.dtype), v.load([key, head * D]), acc * shrink[:, None])
        max_score = new_max
    return acc, max_score, total


def rotate_heads(
    *, qkv: torch.Tensor, angles: torch.Tensor, num_heads: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `Kernels.rotate_heads`. In place if there is a single partial sum in `dtype`."""
    packed = (qkv[0] if qkv.shape[0] == 1 else qkv.sum(0)).to(dtype)
    rows, width = packed.shape
    half = width // (6 * num_heads)
    _rotate_heads[(rows,)](
        packed, angles, rows, 2 * num_heads, half, triton.next_power_of_2(2 * num_heads), triton.next_power_of_2(half),
        PDL=PDL, launch_pdl=PDL, num_warps=4,
    )  # fmt: skip
    q, k, v = packed.view(rows, 3, num_heads, 2 * half).unbind(1)
    return q, k, v


@triton.jit(do_not_specialize=["rows"])
def _rotate_heads(
    qkv, angles, rows, HEADS: tl.constexpr, HALF: tl.constexpr, R: tl.constexpr, H: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    """One program per row; HEADS counts those of q and k."""
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
