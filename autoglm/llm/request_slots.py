"""Per-request state on the device: sampling parameters, token counts, block tables, the last sampled tokens."""

from collections import Counter
from collections.abc import Sequence as Seq

import numpy as np
import torch

from autoglm.config import SparseAttentionConfig
from autoglm.kernels.base import SamplingState
from autoglm.kernels.sampling_metadata import PROMPT_MASK, WIDTH, Column
from autoglm.llm.sequence import Sequence
from autoglm.llm.sparse.policy import num_kept
from autoglm.llm.transfer import Int32Array, send
from autoglm.preprocess.options import Integer, options
from autoglm.preprocess.sampling_params import SamplingParams

PACKED_OPTIONS = [
    (name, each.column, np.uint32 if isinstance(each.kind, Integer) else np.float32)
    for name, each in options(SamplingParams).items()
    if each.column is not None
]


class RequestSlots:
    """Fixed memory for `num_slots` running sequences, and one more slot for the padding rows of a pass.

    Values known on the host (lengths, positions, the last block) are sent with each pass. The slots hold values
    that the host does not know (sampled tokens) or that are too large to resend.
    """

    def __init__(
        self,
        num_slots: int,
        *,
        vocab_size: int,
        max_blocks: int,
        block_size: int,
        device: torch.device,
        pages: SparseAttentionConfig | None = None,
    ) -> None:
        """pages: given if sequences may use the sparse mode `pages`."""
        self.padding = num_slots
        self.device = device
        self.block_size = block_size
        self.pages = pages
        if pages is not None:  # see `Kernels.select_pages`
            self.visual_blocks = torch.zeros(num_slots + 1, max_blocks, dtype=torch.int32, device=device)
            self.num_kept = torch.zeros(num_slots + 1, dtype=torch.int32, device=device)
        self.block_tables = torch.zeros(num_slots + 1, max_blocks, dtype=torch.int32, device=device)
        greedy = torch.from_numpy(pack_sampling_params(SamplingParams(), 0))
        self.state = SamplingState(
            sampling_metadata=greedy.repeat(num_slots + 1, 1).to(device),
            output_token_counts=torch.zeros(num_slots + 1, vocab_size, dtype=torch.int32, device=device),
            last_tokens=torch.zeros(num_slots + 1, dtype=torch.int64, device=device),
            logits_buffer=torch.zeros(num_slots + 1, vocab_size, device=device),
        )

    def initialize(self, sequences: Seq[Sequence]) -> None:
        """Initialise sampling parameters and token counts of newly admitted sequences."""
        if not sequences:
            return
        vocab_size = self.state.output_token_counts.shape[1]
        indices: list[int] = []
        counts: list[int] = []
        for sequence in sequences:
            found = token_counts(sequence)
            indices += [_slot(sequence) * vocab_size + token for token in found]
            counts += found.values()
            self.state.output_token_counts[_slot(sequence)].zero_()
        metadata = [pack_sampling_params(s.request.sampling_params, s.seed, s.deferred) for s in sequences]
        arrays = [list(map(_slot, sequences)), metadata, indices, counts]
        slots, rows, where, values = send([np.array(array, np.int32) for array in arrays], self.device)
        self.state.sampling_metadata.index_copy_(0, slots.long(), rows.view(-1, WIDTH))
        self.state.output_token_counts.view(-1).scatter_(0, where.long(), values)
        if self.pages is not None:
            blocks = [visual_blocks(s, self.block_size, self.visual_blocks.shape[1]) for s in sequences]
            kept = [
                0 if s.sparse is None else num_kept(s.sparse.ratio, int(own.sum()))
                for s, own in zip(sequences, blocks, strict=True)
            ]
            visual, kept_counts = send([np.stack(blocks), np.array(kept, np.int32)], self.device)
            self.visual_blocks.index_copy_(0, slots.long(), visual)
            self.num_kept.index_copy_(0, slots.long(), kept_counts)

    def count_tokens(self, sequence: Sequence, token_ids: Seq[int]) -> None:
        """Count tokens that were appended to a running sequence's answer without being sampled."""
        (added,) = send([np.array(token_ids, np.int32)], self.device)
        self.state.output_token_counts[_slot(sequence)].scatter_add_(0, added.long(), torch.ones_like(added))


def token_counts(sequence: Sequence) -> Counter[int]:
    """The token counts of a sequence; the prompt mask only if a repetition penalty needs it."""
    counts = Counter(sequence.token_ids[sequence.prompt_length :])
    if sequence.request.sampling_params.repetition_penalty != 1:
        for token in set(sequence.token_ids[: sequence.prompt_length]):
            counts[token] += PROMPT_MASK
    return counts


def visual_blocks(sequence: Sequence, block_size: int, max_blocks: int) -> Int32Array:
    """int32 [max_blocks], 1 for blocks that hold visual keys only; all 0 unless the sequence uses `pages`."""
    found = np.zeros(max_blocks, np.int32)
    if sequence.sparse is not None and sequence.sparse.mode == "pages":
        for span in sequence.images:
            found[-(-span.start // block_size) : span.end // block_size] = 1
    return found


def pack_sampling_params(params: SamplingParams, seed: int, deferred: bool = False) -> Int32Array:
    """A row of sampling metadata, int32 [WIDTH]. seed: 0 to 2**64 - 1."""
    row = np.zeros(WIDTH, np.uint32)
    for name, column, dtype in PACKED_OPTIONS:
        row.view(dtype)[column] = getattr(params, name)
    row[Column.SEED_LOW], row[Column.SEED_HIGH], row[Column.DEFERRED] = seed & 0xFFFFFFFF, seed >> 32, deferred
    return row.view(np.int32)


def _slot(sequence: Sequence) -> int:
    if sequence.slot is None:
        raise ValueError(f"request {sequence.request.request_id} has no slot")
    return sequence.slot
