"""A pass through the paged cache, singles and chunks together, against dense attention of each whole sequence."""

import pytest
import torch
import torch.nn.functional as F

from autoglm.checkpoint import TextConfig
from autoglm.kernels.base import Rotary
from autoglm.kernels.reference import dispatch as reference
from autoglm.kernels.reference.attention import gather_angles, rotate
from autoglm.llm.attention import PagedAttention
from autoglm.llm.input_batch import Batch
from autoglm.llm.kv_cache import KVCache

CONFIG = TextConfig(
    vocab_size=8, hidden_size=64, intermediate_size=8, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, rms_norm_eps=1e-5, max_position_embeddings=64, rope_theta=1e4, rotary_dim=8,
    mrope_section=(1, 1, 2),
)  # fmt: skip
CPU = torch.device("cpu")
BLOCK = 4
ERROR = {None: 1e-5, torch.int8: 0.05, torch.float8_e4m3fn: 0.3}


@pytest.mark.parametrize("stored", ERROR)
@pytest.mark.parametrize("singles", [0, 2, 3])
def test_passes_equal_dense_attention(stored: torch.dtype | None, singles: int) -> None:
    """Sequences of 9, 16 and 22 tokens: all but the last tokens come first, in chunks; then what is left of each."""
    torch.manual_seed(0)
    ends, left = [9, 16, 22], [1 if row < singles else 3 + row for row in range(3)]
    table = torch.randperm(18, dtype=torch.int32).view(3, 6)
    angles = torch.rand(64, 4)
    rotary = Rotary(torch.stack((angles.cos(), angles.sin())), (1, 1, 2))
    qkv = [torch.randn(2, end, 8 * 16) for end in ends]
    cache = KVCache(CONFIG, 18, BLOCK, CPU, torch.float32, stored)
    cache.keys.view(torch.uint8).fill_(0xFF)
    run(0, [end - count for end, count in zip(ends, left, strict=True)], [0] * 3, qkv, table, cache, rotary)
    starts = [end - count for end, count in zip(ends, left, strict=True)]
    mixed = run(singles, ends, starts, qkv, table, cache, rotary)
    expected = torch.cat([dense(x, rotary)[start:] for x, start in zip(qkv, starts, strict=True)])
    assert (mixed - expected).abs().max() < ERROR[stored]


def run(
    singles: int,
    ends: list[int],
    starts: list[int],
    qkv: list[torch.Tensor],
    table: torch.Tensor,
    cache: KVCache,
    rotary: Rotary,
) -> torch.Tensor:
    places = [torch.arange(start, end) for start, end in zip(starts, ends, strict=True)]
    slots = [table[row, place // BLOCK].long() * BLOCK + place % BLOCK for row, place in enumerate(places)]
    lengths = [len(place) for place in places]
    batch = Batch(
        singles=singles,
        positions=torch.cat(places).to(torch.int32).expand(3, -1),
        slots=torch.cat(slots),
        block_table=table,
        lengths=torch.tensor(ends, dtype=torch.int32),
        starts=torch.tensor([0, *lengths[singles:]]).cumsum(0).to(torch.int32),
        longest_chunk=max(lengths[singles:], default=0),
    )
    packed = torch.cat([x[:, start:end] for x, start, end in zip(qkv, starts, ends, strict=True)], dim=1)
    return PagedAttention(reference, cache, rotary, batch, CONFIG)(1, packed)


def dense(qkv: torch.Tensor, rotary: Rotary) -> torch.Tensor:
    q, k, v = torch.split(qkv.sum(0).view(-1, 8, 16), [4, 2, 2], dim=1)
    angles = gather_angles(rotary, torch.arange(len(q)).expand(3, -1))
    q, k, v = (x.transpose(0, 1)[None] for x in (rotate(q, angles), rotate(k, angles), v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1).flatten(1)


def test_megabytes_hold_scales_too() -> None:
    """Two layers, two KV heads of 16 numbers, keys and values."""
    sizes = {torch.float32: 512, torch.bfloat16: 256, torch.float8_e4m3fn: 128, torch.int8: 128 + 32}
    for stored, size in sizes.items():
        assert KVCache.bytes_per_token(CONFIG, stored) == size
        blocks = KVCache.blocks_in(1, CONFIG, BLOCK, stored)
        assert blocks == 2**20 // (size * BLOCK)
        cache = KVCache(CONFIG, blocks, BLOCK, CPU, torch.bfloat16, stored) if stored != torch.float32 else None
        assert cache is None or cache.layer(1).keys.dtype == stored


def test_fixed_scales_reach_the_layers() -> None:
    cache = KVCache(CONFIG, 3, BLOCK, CPU, torch.float32, torch.float8_e4m3fn)
    cache.set_scales(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[5.0, 6.0], [7.0, 8.0]]))
    layer = cache.layer(1)
    assert layer.key_scales is not None
    assert layer.value_scales is not None
    assert layer.key_scales[11].tolist() == [3, 4]
    assert layer.value_scales[0].tolist() == [7, 8]
    with pytest.raises(ValueError, match="no fixed scales"):
        KVCache(CONFIG, 3, BLOCK, CPU, torch.float32).set_scales(torch.ones(2, 2), torch.ones(2, 2))


def test_a_cache_in_another_float_than_the_model_is_refused() -> None:
    with pytest.raises(ValueError, match="bfloat16"):
        KVCache(CONFIG, 3, BLOCK, CPU, torch.float32, torch.bfloat16)
