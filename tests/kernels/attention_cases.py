"""Random caches, sequences and qkv for the tests of the attention kernels; whatever nobody may read is NaN."""

import math
from dataclasses import dataclass, replace

import torch

from autoglm.kernels.base import LayerCache, Rotary

STORED = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8, "fp8": torch.float8_e4m3fn}
SPARE = 3  # blocks that belong to no sequence


@dataclass(frozen=True)
class Heads:
    """Shape of an attention layer; `section` are the rotated pairs of a head by axis."""

    heads: int = 4
    kv_heads: int = 2
    size: int = 32
    section: tuple[int, int, int] = (2, 3, 3)

    @property
    def width(self) -> int:
        return (self.heads + 2 * self.kv_heads) * self.size


def make_rotary(shape: Heads, device: torch.device, positions: int = 64) -> Rotary:
    pairs = sum(shape.section)
    angles = torch.arange(positions)[:, None] * 100.0 ** -(torch.arange(pairs) / pairs)
    return Rotary(torch.stack((angles.cos(), angles.sin())).to(device), shape.section)


def make_qkv(shape: Heads, rows: int, splits: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Partial sums [splits, rows, width], fp32 where there are several."""
    qkv = torch.randn(splits, rows, shape.width, device=device) / math.sqrt(splits)
    return qkv if splits > 1 else qkv.to(dtype)


@dataclass(frozen=True)
class Paged:
    """Sequences of `lengths` keys each over a cache of one layer, their blocks in random order."""

    cache: LayerCache
    table: torch.Tensor
    lengths: torch.Tensor

    @classmethod
    def make(
        cls, shape: Heads, lengths: list[int], block_size: int, stored: str, device: torch.device, written: list[int]
    ) -> "Paged":
        """The first `written` places of each sequence hold random keys and values; the rest of the cache is poison."""
        blocks = [-(-length // block_size) for length in lengths]
        order = torch.randperm(sum(blocks) + SPARE, dtype=torch.int32)
        table = torch.full((len(lengths), max(1, *blocks)), 2**30, dtype=torch.int32)
        for row, own in enumerate(torch.split(order[: sum(blocks)], blocks)):
            table[row, : len(own)] = own
        slots = (sum(blocks) + SPARE) * block_size
        cache = make_cache(shape, slots, block_size, stored, device)
        paged = cls(cache, table.to(device), torch.tensor(lengths, dtype=torch.int32, device=device))
        used = torch.cat([paged.slots(row, 0, count) for row, count in enumerate(written)])
        for tensor in (cache.keys, cache.values):
            values = torch.randn(len(used), *tensor.shape[1:]) * (50 if stored == "int8" else 1)
            raw(tensor)[used] = raw(values.to(tensor.dtype).to(device))
        if stored == "int8":
            for scales in (cache.key_scales, cache.value_scales):
                assert scales is not None
                scales[used] = torch.rand(len(used), shape.kv_heads, device=device) / 50
        return paged

    def slots(self, row: int, start: int, end: int) -> torch.Tensor:
        places = torch.arange(start, end, device=self.table.device)
        return self.table[row, places // self.cache.block_size].long() * self.cache.block_size + (
            places % self.cache.block_size
        )

    def copy(self) -> "Paged":
        return replace(self, cache=copy_cache(self.cache))


def make_cache(shape: Heads, slots: int, block_size: int, stored: str, device: torch.device) -> LayerCache:
    """A cache full of poison: NaN, or what is far away from any value in INT8."""
    dtype = STORED[stored]
    poison = -128 if stored == "int8" else float("nan")
    keys, values = (
        torch.full((slots, shape.kv_heads, shape.size), poison, dtype=torch.float32).to(dtype).to(device)
        for _ in range(2)
    )
    scales: list[torch.Tensor | None] = [None, None]
    if stored == "int8":
        scales = [torch.full((slots, shape.kv_heads), float("nan"), device=device) for _ in range(2)]
    elif stored == "fp8":
        scales = [(torch.rand(1, shape.kv_heads, device=device) + 0.1).expand(slots, -1) for _ in range(2)]
    return LayerCache(keys, values, block_size, *scales)


def copy_cache(cache: LayerCache) -> LayerCache:
    def copy(scales: torch.Tensor | None) -> torch.Tensor | None:
        return scales if scales is None or scales.stride(0) == 0 else scales.clone()

    return LayerCache(
        cache.keys.clone(), cache.values.clone(), cache.block_size, copy(cache.key_scales), copy(cache.value_scales)
    )


def raw(x: torch.Tensor) -> torch.Tensor:
    """8-bit floats as bytes: torch cannot index, compare or fill them everywhere."""
    return x.view(torch.uint8) if x.dtype == torch.float8_e4m3fn else x


def dequantized(x: torch.Tensor, scales: torch.Tensor | None) -> torch.Tensor:
    return x.float() if scales is None else x.float() * scales.unsqueeze(-1)


def assert_same_cache(ours: LayerCache, twins: LayerCache, before: LayerCache, written: torch.Tensor) -> None:
    """Equal up to one step of the stored dtype in the slots `written`; as before, bit for bit, everywhere else."""
    steps = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.int8: 1.01, torch.float8_e4m3fn: 2**-2}
    untouched = torch.ones(ours.keys.shape[0], dtype=torch.bool, device=ours.keys.device)
    untouched[written] = False
    for name in ("keys", "values"):
        a, b, old = (getattr(cache, name) for cache in (ours, twins, before))
        relative = 0.0 if a.dtype == torch.int8 else steps[a.dtype]
        absolute = steps[a.dtype] if a.dtype == torch.int8 else 2**-9 if a.dtype == torch.float8_e4m3fn else 1e-5
        torch.testing.assert_close(
            raw(a)[written].view(a.dtype).float(), raw(b)[written].view(b.dtype).float(), rtol=relative, atol=absolute
        )
        torch.testing.assert_close(raw(a)[untouched], raw(old)[untouched], rtol=0, atol=0, equal_nan=True)
    for name in ("key_scales", "value_scales"):
        a, b, old = (getattr(cache, name) for cache in (ours, twins, before))
        if a is not None:
            torch.testing.assert_close(a[written], b[written], rtol=1e-5, atol=0)
            torch.testing.assert_close(a[untouched], old[untouched], rtol=0, atol=0, equal_nan=True)
