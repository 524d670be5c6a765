"""One prompt through the model on its own, without an engine: for calibration, and to measure a pass's memory."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from autoglm.llm.attention import PagedAttention
from autoglm.llm.input_batch import Batch
from autoglm.llm.kv_cache import KVCache

if TYPE_CHECKING:
    from autoglm.llm.model import Attention, LanguageModel

BLOCK_SIZE = 16


@torch.inference_mode()
def prefill(
    model: "LanguageModel",
    hidden: torch.Tensor,
    positions: torch.Tensor,
    around: "Callable[[PagedAttention], Attention]" = lambda attention: attention,
) -> tuple[torch.Tensor, KVCache]:
    """Run one prompt.

    Args:
        hidden: [T, hidden_size], embeddings; may be changed in place.
        positions: int32 [3, T].
        around: what the layers call, given what they usually do.

    Returns:
        [T, hidden_size] after the final norm, and the keys and values in slots 0 to T - 1, in the model's dtype.
    """
    length, device = hidden.shape[0], hidden.device
    blocks = -(-length // BLOCK_SIZE)
    cache = KVCache(model.config, blocks, BLOCK_SIZE, device, hidden.dtype)

    def numbers(*values: int) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    batch = Batch(
        singles=0,
        positions=positions.to(device),
        slots=torch.arange(length, device=device),
        block_table=torch.arange(blocks, dtype=torch.int32, device=device).unsqueeze(0),
        lengths=numbers(length),
        starts=numbers(0, length),
        longest_chunk=length,
    )
    attention = PagedAttention(model.kernels, cache, model.rotary, batch, model.config)
    return model(hidden, around(attention)), cache


@torch.inference_mode()
def largest_pass(model: "LanguageModel", tokens: int, samples: int) -> None:
    """As much at once as the engine's settings allow: `tokens` of a prompt, and logits of `samples` of them."""
    device = model.rotary.table.device
    tokens = min(tokens, model.rotary.table.shape[1])
    hidden = model.embed(torch.zeros(tokens, dtype=torch.long, device=device))
    positions = torch.arange(tokens, dtype=torch.int32, device=device).expand(3, -1)
    model.logits(prefill(model, hidden, positions)[0][:samples])
