"""Passes through the paged cache, of decoding sequences and chunks, against dense attention of each whole sequence."""

import pytest
import torch
import torch.nn.functional as F

from autoglm.checkpoint import TextConfig
from autoglm.kernels.base import AttentionConfig, AttentionMetadata
from autoglm.kernels.reference import dispatch as reference
from autoglm.kernels.reference.attention import gather_angles, rotate
from autoglm.llm.attention import PagedAttention
from autoglm.llm.input_batch import InputBatch
from autoglm.llm.kv_cache import KVCache

CONFIG = TextConfig(
    vocab_size=8, hidden_size=64, intermediate_size=8, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, rms_norm_eps=1e-5, max_position_embeddings=64, rope_theta=1e4, rotary_dim=8,
    mrope_section=(1, 1, 2),
)  # fmt: skip
CPU = torch.device("cpu")
BLOCK = 4
MAX_ERROR = {None: 1e-5, torch.int8: 0.05, torch.float8_e4m3fn: 0.3}


@pytest.mark.parametrize("cache_dtype", MAX_ERROR)
@pytest.mark.parametrize("num_decode", [0, 2, 3])
def test_passes_equal_dense_attention(cache_dtype: torch.dtype | None, num_decode: int) -> None:
    """Sequences of 9, 16 and 22 tokens: the first pass computes all but the last tokens, the second pass these."""
    torch.manual_seed(0)
    ends, num_last = [9, 16, 22], [1 if row < num_decode else 3 + row for row in range(3)]
    table = torch.randperm(18, dtype=torch.int32).view(3, 6)
    angles = torch.rand(64, 4)
    config = AttentionConfig(4, torch.float32, torch.stack((angles.cos(), angles.sin())), (1, 1, 2))
    qkv = [torch.randn(2, end, 8 * 16) for end in ends]
    cache = KVCache(CONFIG, CPU, torch.float32, num_blocks=18, block_size=BLOCK, cache_dtype=cache_dtype)
    cache.keys.view(torch.uint8).fill_(0xFF)
    middles = [end - count for end, count in zip(ends, num_last, strict=True)]
    run([0] * 3, middles, num_decode=0, qkv=qkv, table=table, cache=cache, config=config)
    mixed = run(middles, ends, num_decode=num_decode, qkv=qkv, table=table, cache=cache, config=config)
    expected = torch.cat([dense(x, config)[middle:] for x, middle in zip(qkv, middles, strict=True)])
    assert (mixed - expected).abs().max() < MAX_ERROR[cache_dtype]


def run(
    starts: list[int],
    ends: list[int],
    *,
    num_decode: int,
    qkv: list[torch.Tensor],
    table: torch.Tensor,
    cache: KVCache,
    config: AttentionConfig,
) -> torch.Tensor:
    """One pass over tokens [start, end) of each sequence; the first `num_decode` sequences decode."""
    indices = [torch.arange(start, end) for start, end in zip(starts, ends, strict=True)]
    slots = [table[row, index // BLOCK].long() * BLOCK + index % BLOCK for row, index in enumerate(indices)]
    lengths = [len(index) for index in indices]
    n, positions = num_decode, torch.cat(indices).to(torch.int32).expand(3, -1)
    seq_lens = torch.tensor(ends, dtype=torch.int32)
    prefill = AttentionMetadata(
        positions[:, n:],
        table[n:],
        seq_lens[n:],
        slot_mapping=torch.cat(slots)[n:],
        cu_seqlens_q=torch.tensor([0, *lengths[n:]]).cumsum(0).to(torch.int32),
        max_seqlen_q=max(lengths[n:], default=0),
    )
    batch = InputBatch(
        positions,
        decode=AttentionMetadata(positions[:, :n], table[:n], seq_lens[:n]) if n else None,
        prefill=prefill if n < len(ends) else None,
    )
    packed = torch.cat([x[:, start:end] for x, start, end in zip(qkv, starts, ends, strict=True)], dim=1)
    return PagedAttention(reference, cache, config, batch)(1, packed)


def dense(qkv: torch.Tensor, config: AttentionConfig) -> torch.Tensor:
    """Causal attention of one whole sequence."""
    q, k, v = torch.split(qkv.sum(0).view(-1, 8, 16), [4, 2, 2], dim=1)
    angles = gather_angles(config, torch.arange(len(q)).expand(3, -1))
    q, k, v = (x.transpose(0, 1)[None] for x in (rotate(q, angles), rotate(k, angles), v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1).flatten(1)


def test_bytes_per_token_include_scales() -> None:
    """Two layers, two KV heads of size 16, keys and values."""
    sizes = {torch.float32: 512, torch.bfloat16: 256, torch.float8_e4m3fn: 128, torch.int8: 128 + 32}
    for cache_dtype, size in sizes.items():
        assert KVCache.bytes_per_token(CONFIG, cache_dtype) == size
        model_dtype = torch.float32 if cache_dtype == torch.float32 else torch.bfloat16
        cache = KVCache(CONFIG, CPU, model_dtype, num_blocks=5, block_size=BLOCK, cache_dtype=cache_dtype)
        scales = (cache.key_scales, cache.value_scales) if cache_dtype == torch.int8 else ()
        stored_bytes = sum(part.nbytes for part in (cache.keys, cache.values, *scales) if part is not None)
        assert stored_bytes == size * 5 * BLOCK
        assert cache.layer(1).keys.dtype == cache_dtype


def test_fixed_scales_apply_to_the_layers_and_need_fp8() -> None:
    cache = KVCache(CONFIG, CPU, torch.float32, num_blocks=3, block_size=BLOCK, cache_dtype=torch.float8_e4m3fn)
    cache.set_scales(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[5.0, 6.0], [7.0, 8.0]]))
    layer = cache.layer(1)
    assert layer.key_scales is not None
    assert layer.value_scales is not None
    assert layer.key_scales[11].tolist() == [3, 4]
    assert layer.value_scales[0].tolist() == [7, 8]
    cache = KVCache(CONFIG, CPU, torch.float32, num_blocks=3, block_size=BLOCK)
    with pytest.raises(ValueError, match="no fixed scales"):
        cache.set_scales(torch.ones(2, 2), torch.ones(2, 2))


def test_a_cache_in_another_float_dtype_than_the_model_is_rejected() -> None:
    with pytest.raises(ValueError, match="bfloat16"):
        KVCache(CONFIG, CPU, torch.float32, num_blocks=3, block_size=BLOCK, cache_dtype=torch.bfloat16)
