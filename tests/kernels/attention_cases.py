"""Random caches, sequences and qkv for the tests of the attention kernels. Memory that must not be read is poisoned."""

import math
from dataclasses import dataclass, replace

import torch

from autoglm.kernels.base import AttentionConfig, LayerCache
from tests.kernels.device import DEVICE

CACHE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8, "fp8": torch.float8_e4m3fn}
SPARE_BLOCKS = 3  # blocks that belong to no sequence


@dataclass(frozen=True)
class AttentionShape:
    """The shape of an attention layer. sections: rotated pairs of a head by axis."""

    num_heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    sections: tuple[int, int, int] = (2, 3, 3)

    @property
    def width(self) -> int:
        return (self.num_heads + 2 * self.kv_heads) * self.head_dim


def model_dtype(stored: str) -> torch.dtype:
    """The dtype of the model for a cache of this dtype."""
    return torch.float32 if stored == "fp32" else torch.bfloat16


def make_config(shape: AttentionShape, dtype: torch.dtype, num_positions: int = 64) -> AttentionConfig:
    pairs = sum(shape.sections)
    angles = torch.arange(num_positions)[:, None] * 100.0 ** -(torch.arange(pairs) / pairs)
    table = torch.stack((angles.cos(), angles.sin())).to(DEVICE)
    return AttentionConfig(shape.num_heads, dtype, table, shape.sections)


def make_qkv(shape: AttentionShape, rows: int, num_partials: int, dtype: torch.dtype) -> torch.Tensor:
    """Partial sums [num_partials, rows, width], fp32 if there are several."""
    qkv = torch.randn(num_partials, rows, shape.width, device=DEVICE) / math.sqrt(num_partials)
    return qkv if num_partials > 1 else qkv.to(dtype)


@dataclass(frozen=True)
class PagedSequences:
    """Sequences in a cache of one layer, with their blocks in random order."""

    cache: LayerCache
    block_table: torch.Tensor
    seq_lens: torch.Tensor

    @classmethod
    def make(
        cls, shape: AttentionShape, seq_lens: list[int], block_size: int, stored: str, *, num_written: list[int]
    ) -> "PagedSequences":
        """The first `num_written` tokens of each sequence have random keys and values; the other slots are poisoned."""
        blocks = [-(-seq_len // block_size) for seq_len in seq_lens]
        order = torch.randperm(sum(blocks) + SPARE_BLOCKS, dtype=torch.int32)
        table = torch.full((len(seq_lens), max(1, *blocks)), 2**30, dtype=torch.int32)
        for row, own in enumerate(torch.split(order[: sum(blocks)], blocks)):
            table[row, : len(own)] = own
        cache = make_cache(shape, (sum(blocks) + SPARE_BLOCKS) * block_size, block_size, stored)
        paged = cls(cache, table.to(DEVICE), torch.tensor(seq_lens, dtype=torch.int32, device=DEVICE))
        written = torch.cat([paged.slots(row, 0, count) for row, count in enumerate(num_written)])
        for tensor in (cache.keys, cache.values):
            values = torch.randn(len(written), *tensor.shape[1:]) * (50 if stored == "int8" else 1)
            raw(tensor)[written] = raw(values.to(tensor.dtype).to(DEVICE))
        if stored == "int8":
            for scales in (cache.key_scales, cache.value_scales):
                assert scales is not None
                scales[written] = torch.rand(len(written), shape.kv_heads, device=DEVICE) / 50
        return paged

    def slots(self, row: int, start: int, end: int) -> torch.Tensor:
        """The cache slots of the tokens from `start` to `end` of a sequence."""
        indices = torch.arange(start, end, device=DEVICE)
        size = self.cache.block_size
        return self.block_table[row, indices // size].long() * size + indices % size

    def copy(self) -> "PagedSequences":
        return replace(self, cache=copy_cache(self.cache))


def make_cache(shape: AttentionShape, num_slots: int, block_size: int, stored: str) -> LayerCache:
    """A cache full of poison: NaN, or a value that INT8 keys and values never have."""
    poison = -128 if stored == "int8" else float("nan")
    keys, values = (
        torch.full((num_slots, shape.kv_heads, shape.head_dim), poison, dtype=torch.float32)
        .to(CACHE_DTYPES[stored])
        .to(DEVICE)
        for _ in range(2)
    )
    scales: list[torch.Tensor | None] = [None, None]
    if stored == "int8":
        scales = [torch.full((num_slots, shape.kv_heads), float("nan"), device=DEVICE) for _ in range(2)]
    elif stored == "fp8":
        scales = [(torch.rand(1, shape.kv_heads, device=DEVICE) + 0.1).expand(num_slots, -1) for _ in range(2)]
    return LayerCache(keys, values, block_size, *scales)


def copy_cache(cache: LayerCache) -> LayerCache:
    def copy(scales: torch.Tensor | None) -> torch.Tensor | None:
        return scales if scales is None or scales.stride(0) == 0 else scales.clone()

    return LayerCache(
        cache.keys.clone(), cache.values.clone(), cache.block_size, copy(cache.key_scales), copy(cache.value_scales)
    )


def raw(x: torch.Tensor) -> torch.Tensor:
    """FP8 as bytes: torch cannot index, compare or fill it on every device."""
    return x.view(torch.uint8) if x.dtype == torch.float8_e4m3fn else x


def dequantized(x: torch.Tensor, scales: torch.Tensor | None) -> torch.Tensor:
    return x.float() if scales is None else x.float() * scales.unsqueeze(-1)


def assert_same_cache(found: LayerCache, expected: LayerCache, before: LayerCache, written: torch.Tensor) -> None:
    """In the slots `written` equal up to one step of the stored dtype; in all others unchanged, bit for bit."""
    steps = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.int8: 1.01, torch.float8_e4m3fn: 2**-2}
    untouched = torch.ones(found.keys.shape[0], dtype=torch.bool, device=DEVICE)
    untouched[written] = False
    for name in ("keys", "values"):
        a, b, old = (getattr(cache, name) for cache in (found, expected, before))
        relative = 0.0 if a.dtype == torch.int8 else steps[a.dtype]
        absolute = steps[a.dtype] if a.dtype == torch.int8 else 2**-9 if a.dtype == torch.float8_e4m3fn else 1e-5
        torch.testing.assert_close(
            raw(a)[written].view(a.dtype).float(), raw(b)[written].view(b.dtype).float(), rtol=relative, atol=absolute
        )
        torch.testing.assert_close(raw(a)[untouched], raw(old)[untouched], rtol=0, atol=0, equal_nan=True)
    for name in ("key_scales", "value_scales"):
        a, b, old = (getattr(cache, name) for cache in (found, expected, before))
        if a is not None:
            torch.testing.assert_close(a[written], b[written], rtol=1e-5, atol=0)
            torch.testing.assert_close(a[untouched], old[untouched], rtol=0, atol=0, equal_nan=True)
