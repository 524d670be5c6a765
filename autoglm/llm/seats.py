"""What the device keeps for each running sequence from pass to pass."""

from collections import Counter
from collections.abc import Sequence as Seq

import numpy as np
import torch

from autoglm.kernels.records import IN_PROMPT, WIDTH, record
from autoglm.llm.sequence import Sequence
from autoglm.llm.transfer import send
from autoglm.sampling import SamplingParams


class Seats:
    """Fixed memory for `count` sequences, and one seat more for rows that only pad a pass.

    What the host knows beforehand (lengths, positions, the last block) comes with each pass; here is what it does not
    know, the sampled tokens, and what is too much to send each time.
    """

    def __init__(self, count: int, vocab: int, max_blocks: int, device: torch.device) -> None:
        self.padding = count
        self.tokens = torch.zeros(count + 1, dtype=torch.int64, device=device)  # the last sampled
        self.tables = torch.zeros(count + 1, max_blocks, dtype=torch.int32, device=device)  # blocks
        self.marks = torch.zeros(count + 1, vocab, dtype=torch.int32, device=device)  # see `records`
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
        records = [record(sequence.request.sampling, sequence.seed) for sequence in sequences]
        arrays = [list(map(_seat, sequences)), records, places, marks]
        seats, rows, where, values = send([np.array(array, np.int32) for array in arrays], self.tokens.device)
        self.records.index_copy_(0, seats.long(), rows.view(-1, WIDTH))
        self.marks.view(-1).scatter_(0, where.long(), values)


def count_marks(sequence: Sequence) -> Counter[int]:
    """The marks of a sequence's tokens, by token; the prompt's only where they count for something."""
    found = Counter(sequence.tokens[sequence.prompt_length :])
    if sequence.request.sampling.repetition_penalty != 1:
        for token in set(sequence.tokens[: sequence.prompt_length]):
            found[token] += IN_PROMPT
    return found


def _seat(sequence: Sequence) -> int:
    if sequence.seat is None:
        raise ValueError(f"request {sequence.request.request_id} has no seat")
    return sequence.seat
