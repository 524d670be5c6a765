"""What the device keeps for each running sequence from pass to pass."""

import struct
from collections import Counter
from collections.abc import Sequence as Seq

import numpy as np
import torch

from autoglm.kernels.sampling_metadata import IN_PROMPT, WIDTH
from autoglm.llm.sequence import Sequence
from autoglm.llm.transfer import Numbers, send
from autoglm.preprocess.sampling_params import SamplingParams


class Seats:
    """Fixed memory for `count` sequences, and one seat more for rows that only pad a pass.

    What the host knows beforehand (lengths, positions, the last block) comes with each pass; here is what it does not
    know, the sampled tokens, and what is too much to send each time.
    """

    def __init__(
        self, count: int, vocab: int, max_blocks: int, device: torch.device, paging: int | None = None
    ) -> None:
        """`paging` is the size of blocks among which sequences may choose; None: nobody does."""
        self.padding = count
        self.paging = paging
        if paging is not None:
            self.visual = torch.zeros(count + 1, max_blocks, dtype=torch.int32, device=device)  # see `choose_pages`
            self.kept = torch.zeros(count + 1, dtype=torch.int32, device=device)
        self.tokens = torch.zeros(count + 1, dtype=torch.int64, device=device)  # the last sampled
        self.tables = torch.zeros(count + 1, max_blocks, dtype=torch.int32, device=device)  # blocks
        self.marks = torch.zeros(count + 1, vocab, dtype=torch.int32, device=device)  # see `records`
        self.logits = torch.zeros(count + 1, vocab, device=device)  # of the last pass, where the choice is deferred
        harmless = torch.tensor(record(SamplingParams(), 0), dtype=torch.int32)
        self.records = harmless.repeat(count + 1, 1).to(device)

    def enter(self, sequences: Seq[Sequence]) -> None:
        """Write down the wishes of sequences that have just got their seats, and which tokens they have so far."""
        if not sequences:
            return
        vocab = self.marks.shape[1]
        places: list[int] = []
        marks: list[int] = []
        for sequence in sequences:
            found = count_marks(sequence)
            places += [_seat(sequence) * vocab + token for token in found]
            marks += found.values()
            self.marks[_seat(sequence)].zero_()
        records = [record(s.request.sampling, s.seed, s.deferred) for s in sequences]
        arrays = [list(map(_seat, sequences)), records, places, marks]
        seats, rows, where, values = send([np.array(array, np.int32) for array in arrays], self.tokens.device)
        self.records.index_copy_(0, seats.long(), rows.view(-1, WIDTH))
        self.marks.view(-1).scatter_(0, where.long(), values)
        if self.paging is not None:
            blocks = [visual_blocks(sequence, self.paging, self.visual.shape[1]) for sequence in sequences]
            counts = [
                0 if sequence.sparsity is None else sequence.sparsity.kept(int(own.sum()))
                for sequence, own in zip(sequences, blocks, strict=True)
            ]
            visual, kept = send([np.stack(blocks), np.array(counts, np.int32)], self.tokens.device)
            self.visual.index_copy_(0, seats.long(), visual)
            self.kept.index_copy_(0, seats.long(), kept)

    def count(self, sequence: Sequence, tokens: Seq[int]) -> None:
        """Mark tokens that the answer of a sequence in its seat has got without being sampled."""
        (added,) = send([np.array(tokens, np.int32)], self.tokens.device)
        self.marks[_seat(sequence)].scatter_add_(0, added.long(), torch.ones_like(added))


def count_marks(sequence: Sequence) -> Counter[int]:
    """The marks of a sequence's tokens, by token; the prompt's only where they count for something."""
    found = Counter(sequence.tokens[sequence.prompt_length :])
    if sequence.request.sampling.repetition_penalty != 1:
        for token in set(sequence.tokens[: sequence.prompt_length]):
            found[token] += IN_PROMPT
    return found


def visual_blocks(sequence: Sequence, block_size: int, max_blocks: int) -> Numbers:
    """int32 [max_blocks], 1 for blocks of visual keys only, of sequences that choose among them."""
    found = np.zeros(max_blocks, np.int32)
    if sequence.sparsity is not None and sequence.sparsity.mode == "pages":
        for span in sequence.images:
            found[-(-span.start // block_size) : span.end // block_size] = 1
    return found


def _seat(sequence: Sequence) -> int:
    if sequence.seat is None:
        raise ValueError(f"request {sequence.request.request_id} has no seat")
    return sequence.seat


def record(params: SamplingParams, seed: int, deferred: bool = False) -> list[int]:
    """A sequence's record, int32 [WIDTH]. seed: from 0 to 2**64 - 1"""
    packed = struct.pack(
        "<6f4I",
        params.temperature,
        params.top_p,
        params.min_p,
        params.frequency_penalty,
        params.presence_penalty,
        params.repetition_penalty,
        params.top_k,
        seed & 0xFFFFFFFF,
        seed >> 32,
        deferred,
    )
    return list(struct.unpack(f"<{WIDTH}i", packed))
