"""`snap`: the keys of a computed prompt that stay, written to blocks of the sequence's own; see `sparsity`."""

import numpy as np
import torch

from autoglm.llm.input_batch import key_slots
from autoglm.llm.kv_cache import KVCache
from autoglm.llm.sequence import Sequence
from autoglm.llm.transfer import send


def thin_out(sequence: Sequence, cache: KVCache) -> None:
    """Copy the keys and values of text, and of the visual tokens with most attention, to `sequence.thin_blocks`.

    Each layer and KV head keeps its own, in their order. To be called behind the pass that computes the prompt's end.
    """
    if sequence.attention is None or sequence.sparsity is None:
        raise ValueError(f"request {sequence.request.request_id}: nothing has been seen of its images")
    visual = np.concatenate([np.arange(span.start, span.end) for span in sequence.images])
    text = np.setdiff1d(np.arange(sequence.prompt_length), visual, assume_unique=True)
    slots = key_slots(sequence, cache.block_size, 0, sequence.prompt_length)
    kept = np.arange(sequence.prompt_length - sequence.superfluous)
    targets = np.array(sequence.thin_blocks)[kept // cache.block_size] * cache.block_size + kept % cache.block_size
    arrays = [array.astype(np.int32) for array in (visual, text, slots, targets)]
    where, texts, sources, target = (sent.long() for sent in send(arrays, sequence.attention.device))
    places = keep_strongest(sequence.attention, sequence.sparsity.kept(sequence.visual), where, texts)
    cache.copy(sources[places], target)


def keep_strongest(attention: torch.Tensor, count: int, visual: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """Places of the keys that stay, in ascending order.

    Args:
        attention: fp32 [layers, kv_heads, v], what each visual key was given.
        visual, text: int64 [v] and [t], places of the visual keys and of the others.

    Returns:
        int64 [layers, kv_heads, t + count].
    """
    strongest = visual[attention.topk(count).indices]
    return torch.cat((strongest, text.expand(*strongest.shape[:2], -1)), dim=-1).sort().values
