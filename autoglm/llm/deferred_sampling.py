"""Tokens that are chosen behind their pass: what a grammar allows is known only once the token before has come.

The pass leaves the logits of such rows in their seats. While it runs, the host receives the tokens of the pass ahead,
lets the grammars advance and makes the masks; the choice is then launched behind the pass, and in front of the next.
"""

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch

from autoglm.kernels.base import Kernels
from autoglm.llm.request_slots import Seats
from autoglm.llm.scheduler import Chunk
from autoglm.llm.sequence import Sequence, TokenLogprob
from autoglm.llm.transfer import Arrival, Numbers, send, stage
from autoglm.preprocess.sampling_params import MAX_LOGPROBS

Sampled: TypeAlias = tuple[Sequence, int, TokenLogprob | None]


@dataclass(frozen=True)
class Logprobs:
    """The log probabilities of the chosen tokens of some rows, and of the most probable ones."""

    rows: list[int]
    values: Arrival  # fp32 [n, 1 + MAX_LOGPROBS], the chosen one's first
    ids: Arrival  # int64 [n, MAX_LOGPROBS]


@dataclass(frozen=True)
class LateTokens:
    """Tokens on their way from the device, one for each sequence."""

    sequences: list[Sequence]
    tokens: Arrival
    logprobs: Logprobs | None

    def wait(self) -> list[Sampled]:
        tokens = self.tokens.wait().tolist()
        found: dict[int, TokenLogprob] = {}
        if self.logprobs is not None:
            values, ids = self.logprobs.values.wait().tolist(), self.logprobs.ids.wait().tolist()
            for row, (own, *others), names in zip(self.logprobs.rows, values, ids, strict=True):
                top = list(zip(names, others, strict=True))[: self.sequences[row].request.sampling.logprobs]
                found[row] = TokenLogprob(tokens[row], own, top)
        return [(sequence, tokens[row], found.get(row)) for row, sequence in enumerate(self.sequences)]


def choose_late(kernels: Kernels, seats: Seats, chunks: Seq[Chunk], masks: Numbers) -> LateTokens:
    """Launch the choice for deferred rows of the pass that was launched last. Waits for nothing.

    Args:
        chunks: theirs; the sequences still have their seats.
        masks: int32 [n, words], what is allowed, see `Kernels.sample_late`.
    """
    sequences = [chunk.sequence for chunk in chunks]
    rows = [row for row, sequence in enumerate(sequences) if sequence.request.sampling.logprobs is not None]
    steps = [chunk.end - chunk.sequence.prompt_length for chunk in chunks]
    arrays = [np.array(array, np.int32) for array in ([sequence.seat for sequence in sequences], steps, rows)]
    where, step, wanted = send(arrays, seats.tokens.device)
    mask = stage(masks, seats.tokens.device).to(seats.tokens.device, non_blocking=True)
    wanted = wanted.long()
    kept = seats.records, seats.marks, seats.tokens, seats.logits
    if not rows:
        return LateTokens(sequences, Arrival(kernels.sample_late(where, step, mask, *kept)), None)
    logs = seats.logits.index_select(0, where.long().index_select(0, wanted)).log_softmax(-1)  # before they are changed
    chosen = kernels.sample_late(where, step, mask, *kept)
    own = logs.gather(1, chosen.long().index_select(0, wanted)[:, None])
    values, ids = logs.topk(MAX_LOGPROBS)
    logprobs = Logprobs(rows, Arrival(torch.cat((own, values), 1)), Arrival(ids))
    return LateTokens(sequences, Arrival(chosen), logprobs)
