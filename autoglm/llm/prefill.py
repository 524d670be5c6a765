"""Runs one prompt through the model without an engine: for calibration, and to measure the memory of a pass."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from autoglm.kernels.base import AttentionMetadata
from autoglm.llm.attention import PagedAttention
from autoglm.llm.input_batch import InputBatch
from autoglm.llm.kv_cache import KVCache

if TYPE_CHECKING:
    from autoglm.llm.model import Attention, LanguageModel

BLOCK_SIZE = 16


@torch.inference_mode()
def prefill(
    model: "LanguageModel",
    hidden: torch.Tensor,
    positions: torch.Tensor,
    wrap: "Callable[[PagedAttention], Attention]" = lambda attention: attention,
) -> tuple[torch.Tensor, KVCache]:
    """Run one prompt.

    Args:
        hidden: [T, hidden_size], embeddings; may be changed in place.
        positions: int32 [3, T].
        wrap: replaces the attention that the layers call.

    Returns:
        [T, hidden_size] after the final norm, and a cache with the keys and values in its first T slots, in the
        model's dtype.
    """
    length, device = hidden.shape[0], hidden.device
    blocks = -(-length // BLOCK_SIZE)
    cache = KVCache(model.config, device, hidden.dtype, num_blocks=blocks, block_size=BLOCK_SIZE)

    cu_seqlens = torch.tensor([0, length], dtype=torch.int32, device=device)
    positions = positions.to(device)
    metadata = AttentionMetadata(
        positions,
        block_table=torch.arange(blocks, dtype=torch.int32, device=device).unsqueeze(0),
        seq_lens=cu_seqlens[1:],
        slot_mapping=torch.arange(length, device=device),
        cu_seqlens_q=cu_seqlens,
        max_seqlen_q=length,
    )
    attention = PagedAttention(model.kernels, cache, model.attention_config, InputBatch(positions, prefill=metadata))
    return model(hidden, wrap(attention)), cache


@torch.inference_mode()
def largest_pass(model: "LanguageModel", num_tokens: int, num_samples: int) -> None:
    """The largest pass the engine's settings allow: a prompt of `num_tokens`, and the logits of `num_samples` rows."""
    device = model.device
    num_tokens = min(num_tokens, model.attention_config.rotary_table.shape[1])
    hidden = model.embed(torch.zeros(num_tokens, dtype=torch.long, device=device))
    positions = torch.arange(num_tokens, dtype=torch.int32, device=device).expand(3, -1)
    model.logits(prefill(model, hidden, positions)[0][:num_samples])
